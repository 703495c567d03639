"""The head is found in all kinds of models, looked at, replaced, and left as it was."""

import dataclasses
import re
from collections import OrderedDict, namedtuple
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_resmem.errors import HeadError, InputError
from lightning_resmem.model.head import Captured, HeadTap
from lightning_resmem.model.modes import evaluation_mode
from lightning_resmem.model.returned import check_returned


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
        for module in model.modules()
    )


@pytest.fixture(autouse=True)
def _compiled_graphs_are_forgotten():
    yield
    torch._dynamo.reset()


class MLP(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
        self.fc = nn.Linear(5, outputs)

    def forward(self, x):
        return self.fc(self.body(x))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        features = self.relu(self.conv(x))
        return self.classifier(features.mean(dim=(2, 3)))


class Residual(nn.Module):
    """Defined in another order than it is executed in, and with a Linear that is never executed."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.encoder(x)
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


VECTORS, IMAGES, TOKENS = (4, 6), (4, 1, 8, 8), (4, 5, 8)
NETWORKS = {
    "mlp": (MLP, VECTORS, "fc"),
    "cnn": (CNN, IMAGES, "classifier"),
    "residual": (Residual, VECTORS, "head"),
    "transformer": (Transformer, TOKENS, "head"),
}


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("network", "shape", "head"), NETWORKS.values(), ids=NETWORKS)
def test_the_head_is_found(network, shape, head, mode):
    model, x = network().train(mode), torch.randn(shape)
    tap = HeadTap.find(model, lambda: model(x))
    assert (tap.head, tap.embedding) == (head, None)
    assert hooks(model) == 0
    model.eval()
    with torch.no_grad():
        expected = model(x)
        with tap.capture():
            assert torch.equal(model(x), expected)
            captured = tap.take()
    assert torch.equal(captured.output, expected)
    assert torch.equal(model.get_submodule(head)(captured.embedding), expected)
    assert hooks(model) == 0


@dataclasses.dataclass
class Outputs:
    loss: torch.Tensor | None
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    """As transformers has it: an ordered dict with the fields of a dataclass."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclasses.dataclass
class ClassifierOutput(ModelOutput):
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None


Pair = namedtuple("Pair", "features logits")

RETURNED = {
    "logits": lambda h, o: o,
    "softmax": lambda h, o: o.softmax(1),
    "log_softmax": lambda h, o: o.log_softmax(1),
    "sigmoid": lambda h, o: o.sigmoid(),
    "bfloat16 softmax": lambda h, o: o.softmax(1).bfloat16(),
    "half logits": lambda h, o: o.half(),
    "double logits": lambda h, o: o.double(),
    "tuple": lambda h, o: (h, o),
    "nested": lambda h, o: {"loss": torch.tensor(1.0), "out": [h, (o, None, "text", 3)]},
    "logits and softmax": lambda h, o: (o, o.softmax(1)),
    "dict": lambda h, o: {"hidden": h, "logits": o, "classes": o.argmax(1)},
    "dataclass": lambda h, o: Outputs(None, o),
    "namedtuple": lambda h, o: Pair(h, o),
    "ModelOutput": lambda h, o: ClassifierOutput(logits=o, hidden_states=(h, h)),
}


class Returning(nn.Module):
    """Runs an auxiliary Linear after the head, so that the last one executed is not the head."""

    def __init__(self, returned, outputs=3):
        super().__init__()
        self.net, self.returned = MLP(outputs), returned
        self.auxiliary = nn.Linear(5, outputs)

    def forward(self, x):
        h = self.net.body(x)
        outputs = self.net.fc(h)
        self.auxiliary(h)
        return self.returned(h, outputs)


@pytest.mark.parametrize("returned", RETURNED.values(), ids=RETURNED)
def test_the_head_is_the_one_whose_output_the_model_returns(returned):
    model = Returning(returned)
    assert HeadTap.find(model, lambda: model(torch.randn(4, 6))).head == "net.fc"


@pytest.mark.parametrize("squeeze", [lambda h, o: o.squeeze(1), lambda h, o: o[:, 0].sigmoid(), lambda h, o: o])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_head_of_a_regression(squeeze, rows):
    model = Returning(squeeze, outputs=1)
    assert HeadTap.find(model, lambda: model(torch.randn(rows, 6))).head == "net.fc"


def test_the_head_is_found_though_it_returns_nan():
    model = Returning(lambda h, o: o)
    model.net.fc.weight.data.fill_(torch.nan)
    assert HeadTap.find(model, lambda: model(torch.randn(4, 6))).head == "net.fc"


def test_without_outputs_the_head_is_the_last_linear_that_ran():
    model = Residual()
    assert HeadTap.find(model, lambda: (model(torch.randn(4, 6)), None)[1], returns_outputs=False).head == "head"


# -- errors of find


class TwoHeads(MLP):
    def __init__(self):
        super().__init__()
        self.coarse = nn.Linear(5, 2)

    def forward(self, x):
        h = self.body(x)
        return {"fine": self.fc(h), "coarse": self.coarse(h)}


def test_two_heads_are_ambiguous():
    model = TwoHeads()
    with pytest.raises(HeadError, match=r"returns the outputs of 'fc', 'coarse'\. Choose .*first .*head='fc'"):
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))
    with pytest.raises(HeadError, match=r"Choose .*first .*head='coarse'"):  # whichever is called last
        HeadTap.find(model, lambda: tuple(model(torch.randn(4, 6)).values())[::-1])
    assert hooks(model) == 0


def test_no_linear():
    model = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    with pytest.raises(HeadError, match=r"No nn.Linear was executed.*head='1'"):
        HeadTap.find(model, lambda: model(torch.randn(4, 1, 8, 8)))
    with pytest.raises(
        HeadError, match=r"none of its modules\. Name .* one of '0', '1'; what no module makes .*MyHead"
    ):
        HeadTap.find(model, lambda: model(torch.randn(4, 1, 8, 8)) * 2)


@pytest.mark.parametrize(
    "returned",
    [
        lambda h, o: o / 3,
        lambda h, o: -o.abs() - 1,
        lambda h, o: o.argmax(1),
        lambda h, o: o.sum(),
        lambda h, o: o.mul_(3),  # in place
        lambda h, o: None,
        lambda h, o: {"loss": torch.tensor(1.0)},
    ],
)
def test_something_else_is_returned(returned):
    model = Returning(returned)
    with pytest.raises(
        HeadError, match=r"none of the nn.Linear.*'net.body.0', 'net.fc', 'auxiliary'.*head='auxiliary'"
    ):
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))


@pytest.mark.parametrize("returned", [lambda h, o: o[:, :2], lambda h, o: {"wide": h, "logits": o}])
def test_a_network_that_returns_nan_is_not_blamed_for_its_head(returned):
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    model.forward = lambda x: returned(h := model[0](x), model[1](h))
    x = torch.randn(4, 6)
    x[:3] = torch.nan
    with pytest.raises(HeadError):
        HeadTap.find(model, lambda: model(x))
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            model[1].bias.fill_(bad)
        with pytest.raises(InputError, match=r"all of the 4 rows .*diverged: .*gradient_clip_val.*precision="):
            HeadTap.find(model, lambda: model(x))
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_exception_in_the_model():
    model = MLP()
    with pytest.raises(RuntimeError, match="shapes"):
        HeadTap.find(model, lambda: model(torch.randn(4, 7)))
    tap = HeadTap(model, "fc", embedding="body")
    for context in (tap.capture, lambda: tap.route(lambda captured: captured.output)):
        with context():
            assert hooks(model) > 0
        with pytest.raises(RuntimeError, match="shapes"), context():
            model(torch.randn(4, 7))
        assert hooks(model) == 0


# -- names


def test_head_by_name():
    model, x = TwoHeads(), torch.randn(4, 6)
    tap = HeadTap(model, "coarse")
    with tap.capture():
        outputs = model(x)
        assert torch.equal(tap.take().output, outputs["coarse"])


def test_head_by_any_of_its_names():
    model = Returning(lambda h, o: o)
    model.head = model.net.fc
    tap = HeadTap(model, "head")
    with tap.capture():
        model(torch.randn(4, 6))
        assert tap.take().output.shape == (4, 3)
    assert HeadTap.find(model, lambda: model(torch.randn(4, 6))).head == "net.fc"


@pytest.mark.parametrize("name", ["fv", "net.fv", "", "net.fc.weight", "_orig_mod.net.fc", 3, "net."])
@pytest.mark.parametrize("argument", ["head", "embedding"])
def test_unknown_names_list_real_ones(name, argument):
    names = {"head": "net.fc", argument: name}
    with pytest.raises(HeadError, match=rf"{argument}={name!r} is not a module of Returning.*'net.body.0', 'net.fc'"):
        HeadTap(Returning(lambda h, o: o), **names)


def test_a_module_instead_of_its_name():
    model = Returning(lambda h, o: o)
    with pytest.raises(HeadError, match=r"Give its name, 'net.fc'"):
        HeadTap(model, model.net.fc)


def test_unknown_names_in_a_model_without_linear():
    with pytest.raises(HeadError, match=r"for example '0', '1'"):
        HeadTap(nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten()), "fc")


# -- embedding of another module


class Stages(nn.Module):
    """`self.layer` returns whatever `wrap` makes of its output, and an in-place activation follows."""

    def __init__(self, layer, wrap=lambda h: h, unwrap=lambda h: h):
        super().__init__()
        self.layer, self.mark, self.fc = layer, nn.Identity(), nn.Linear(4, 3)
        self.wrap, self.unwrap = wrap, unwrap

    def forward(self, x):
        h = self.unwrap(self.mark(self.wrap(self.layer(x))))
        h = nn.functional.relu(h, inplace=True)
        return self.fc(h.flatten(2).mean(2) if h.ndim > 3 else h)


EMBEDDINGS = {
    "2-D": (nn.Linear(6, 4), VECTORS, lambda h: h),
    "4-D": (nn.Conv2d(1, 4, 3), IMAGES, lambda h: h.mean(dim=(2, 3))),
    "5-D": (nn.Conv3d(1, 4, 3), (4, 1, 4, 5, 6), lambda h: h.mean(dim=(2, 3, 4))),
}


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda h: h, lambda h: h),
        (lambda h: (h, None), lambda h: h[0]),
        (lambda h: {"none": None, "h": h}, lambda h: h["h"]),
    ],
    ids=["tensor", "tuple", "dict"],
)
@pytest.mark.parametrize(("layer", "shape", "pooled"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embedding_of_another_module(layer, shape, pooled, wrap, unwrap):
    layer.reset_parameters()  # made before the random generator was seeded
    model, x = Stages(layer, wrap, unwrap), torch.randn(shape)
    tap = HeadTap.find(model, lambda: model(x), embedding="mark")
    assert (tap.head, tap.embedding) == ("fc", "mark")
    with tap.capture():
        output = model(x)
        captured = tap.take()
    expected = pooled(layer(x))
    assert (expected < 0).any()  # so it was taken before the activation
    torch.testing.assert_close(captured.embedding, expected.detach())
    assert torch.equal(captured.output, output)
    assert not captured.embedding.requires_grad
    assert hooks(model) == 0


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.fc = nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.layer(x)[:, 0])


def test_a_sequence_is_no_embedding():
    model = Sequences()
    tap = HeadTap(model, "fc", embedding="layer")
    with (
        pytest.raises(HeadError, match=r"embedding='layer' returns shape \(4, 5, 4\), expected \(B, D\)"),
        tap.capture(),
    ):
        model(torch.randn(TOKENS))
    assert hooks(model) == 0


def test_an_output_without_a_tensor_is_no_embedding():
    model = Stages(nn.Linear(6, 4), wrap=lambda h: [h], unwrap=lambda h: h[0])
    model.mark = nn.Module()
    model.mark.forward = lambda h: ("text", setattr(model, "kept", h[0]))[:1]
    model.unwrap = lambda _: model.kept
    tap = HeadTap(model, "fc", embedding="mark")
    with pytest.raises(HeadError, match="embedding='mark' returns no tensor"), tap.capture():
        model(torch.randn(4, 6))


def test_an_embedding_that_comes_after_the_head():
    model = Returning(lambda h, o: o)
    tap = HeadTap(model, "net.fc", embedding="auxiliary")
    for _ in range(2):  # also on the second batch, when that of the first was computed
        with pytest.raises(HeadError, match=r"'auxiliary' was not computed before .*'net.fc'.*earlier"), tap.capture():
            model(torch.randn(4, 6))


# -- errors of capture


def test_a_head_that_does_not_fire():
    model = Residual()
    tap = HeadTap(model, "unused")
    with tap.capture():
        model(torch.randn(4, 6))
        with pytest.raises(HeadError, match=r"'unused' was not called .*head=.*forward_fn"):
            tap.take()


class Twice(MLP):
    def forward(self, x):
        return self.fc(self.body(x)) + self.fc(self.body(-x))


def test_a_head_that_fires_twice():
    model = Twice()
    tap = HeadTap(model, "fc")
    with tap.capture():
        model(torch.randn(4, 6))
        with pytest.raises(HeadError, match=r"'fc' was called 2 times in one forward.*head=.*forward_fn"):
            tap.take()
        tap.clear()
        model.fc(torch.randn(4, 5))
        assert tap.take().output.shape == (4, 3)
        with pytest.raises(HeadError, match="was not called"):
            tap.take()


def test_nothing_is_kept_after_the_block():
    model = MLP()
    tap = HeadTap(model, "fc")
    with tap.capture():
        model(torch.randn(4, 6))
    with pytest.raises(HeadError, match="was not called"):
        tap.take()


def test_the_input_of_the_head_has_to_be_a_vector_a_row():
    model = nn.Sequential(nn.Linear(8, 3))
    tap = HeadTap(model, "0")
    with pytest.raises(HeadError, match=r"input of the head '0' has shape .*\(B, D\).*embedding="), tap.capture():
        model(torch.randn(2, *TOKENS))


def test_positions_of_sequences_are_rows():
    model, inputs = nn.Sequential(nn.Linear(8, 3)), torch.randn(2, 5, 8)
    tap = HeadTap(model, "0")
    with tap.capture():
        outputs = model(inputs)
        captured = tap.take()
    assert torch.equal(captured.embedding, inputs)
    assert torch.equal(captured.rows.embedding, inputs.reshape(10, 8))
    assert torch.equal(captured.rows.output, outputs.reshape(10, 3))


def test_a_row_is_no_batch():
    model = nn.Sequential(nn.Linear(8, 3))
    tap, message = HeadTap(model, "0"), r"head '0' has shape \(8,\), expected \(B, D\): the batch dimension is missing"
    with pytest.raises(InputError, match=message), tap.capture():
        model(torch.randn(8))


@pytest.mark.parametrize(
    ("head", "returned", "message"),
    [
        ("0", lambda y: y, r"head='0' makes outputs of width 6 from an embedding of width 8, .* width 3: .*head='2'"),
        ("1", lambda y: {"logits": y}, "head='1' makes outputs of width 6 from an embedding of width 6"),
        ("0", lambda y: y[:, :2], "Name that module"),
        ("0", lambda y: y[:, 0], None),  # what has no width tells nothing
        ("0", lambda y: y.argmax(dim=1, keepdim=True), None),
        ("0", lambda y: y.sum(dim=0, keepdim=True), None),
        ("2", lambda y: y.softmax(dim=1), None),
        ("2", lambda y: (torch.zeros(4, 7), y), None),
    ],
)
def test_a_head_that_is_not_the_last_layer(head, returned, message):
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    tap = HeadTap(model, head)
    with tap.capture():
        result = returned(model(torch.randn(4, 8)))
        captured = tap.take()
    with pytest.raises(HeadError, match=message) if message else nullcontext():
        check_returned(model, head, *captured, result)


@pytest.mark.parametrize(
    "returned",
    [lambda x: (x, x), lambda x: x[:, None, None], lambda x: x[:, 0], lambda x: {"x": x}],
)
def test_the_output_of_the_head_has_to_be_a_matrix(returned):
    class Odd(nn.Module):
        def forward(self, x):
            return returned(x)

    model = nn.Sequential(Odd())
    tap = HeadTap(model, "0")
    with pytest.raises(HeadError, match=r"head '0' returned .*a tensor \(B, C\).*head="), tap.capture():
        model(torch.randn(4, 6))


@pytest.mark.parametrize(("inputs", "outputs"), [((4, 6), (4, 1, 6)), ((4, 3, 6), (4, 6)), ((4, 3, 6), (4, 2, 6))])
def test_there_is_one_embedding_for_each_output(inputs, outputs):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.zeros(outputs)

    model = nn.Sequential(Odd())
    tap = HeadTap(model, "0")
    message = r"one embedding for each output, \(B, T, D\) and .*embedding= and head="
    with pytest.raises(HeadError, match=message), tap.capture():
        model(torch.randn(inputs))


def test_the_input_of_the_head_has_to_be_a_tensor():
    class Texts(nn.Module):
        def forward(self, texts):
            return torch.zeros(len(texts), 2)

    model = nn.Sequential(Texts())
    with pytest.raises(HeadError, match="input of the head '0' is not a tensor"), HeadTap(model, "0").capture():
        model(["a", "b"])


class ByKeyword(MLP):
    def forward(self, x):
        return self.fc(input=self.body(x))


def test_a_head_called_by_keyword():
    model, x = ByKeyword(), torch.randn(4, 6)
    tap = HeadTap.find(model, lambda: model(x))
    with tap.capture():
        output = model(x)
        captured = tap.take()
    assert torch.equal(captured.embedding, model.body(x))
    assert torch.equal(captured.output, output)


def test_changes_in_place_do_not_reach_what_was_captured():
    model = Returning(lambda h, o: (h.zero_(), o.zero_())[1])
    x = torch.randn(4, 6)
    expected = model.net.body(x)
    tap = HeadTap(model, "net.fc")
    with torch.no_grad(), tap.capture():
        model(x)
        captured = tap.take()
    torch.testing.assert_close(captured.embedding, expected.detach())
    torch.testing.assert_close(captured.output, model.net.fc(expected).detach())


# -- route


def test_route_replaces_the_output_and_leaves_the_model_as_it_was():
    model, x = MLP().eval(), torch.randn(4, 6)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(x)
    tap = HeadTap(model, "fc")
    seen = []

    def combine(captured):
        seen.append(captured)
        return captured.output + 7

    with tap.route(combine):
        assert torch.equal(model(x), before + 7)
        assert torch.equal(model.fc(model.body(x)), before + 7)  # whoever calls it
    assert torch.equal(model(x), before)
    assert hooks(model) == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert len(seen) == 2
    assert torch.equal(seen[0].output, before)
    assert not seen[0].output.requires_grad


@pytest.mark.parametrize("first", ["look", "route"])
def test_who_looks_sees_the_base_beside_who_replaces(first):
    model, x = MLP().eval(), torch.randn(4, 6)
    before = model(x)
    looked, routed = [], []

    def combine(captured):
        routed.append(captured)
        return captured.output + 7

    contexts = [HeadTap(model, "fc").capture(looked.append), HeadTap(model, "fc").route(combine)]
    one, other = contexts if first == "look" else contexts[::-1]
    with one, other:
        assert torch.equal(model(x), before + 7)
    assert torch.equal(looked[0].output, before)
    assert torch.equal(routed[0].output, before)
    assert hooks(model) == 0


def test_hooks_of_others_stay():
    model = MLP()
    calls = []
    model.fc.register_forward_hook(lambda *args: calls.append(args))
    with HeadTap(model, "fc").route(lambda captured: captured.output):
        model(torch.randn(4, 6))
    model(torch.randn(4, 6))
    assert len(calls) == 2
    assert len(model.fc._forward_hooks) == 1


def test_an_error_in_combine_passes_through():
    model = MLP()

    def combine(captured: Captured):
        raise ValueError("no answer")

    with pytest.raises(ValueError, match="no answer"), HeadTap(model, "fc").route(combine):
        model(torch.randn(4, 6))
    assert hooks(model) == 0


# -- compiled models


def compile_net(model):
    model.net = torch.compile(model.net, backend="eager")
    return model


def compile_in_place(model):
    model.net.compile(backend="eager")
    return model


def compile_all(model):
    return torch.compile(model, backend="eager")


def compile_both(model):
    return compile_all(compile_net(model))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLP()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("compile_model", [compile_net, compile_in_place, compile_all, compile_both])
def test_models_that_were_compiled_and_called(compile_model):
    model, x = compile_model(Wrapped()), torch.randn(4, 6)
    with torch.no_grad():
        before = model(x)
    with evaluation_mode(model):
        tap = HeadTap.find(model, lambda: model(x), embedding="net.body")
        assert tap.head == "net.fc"
        with tap.capture():
            model(x)
            captured = tap.take()
        with HeadTap(model, "net.fc").route(lambda c: c.output + 7):
            assert torch.equal(model(x), captured.output + 7)
    torch.testing.assert_close(captured.output, before)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    assert hooks(model) == 0


def test_outside_of_evaluation_mode_a_compiled_graph_would_hide_the_head():
    """The reason for evaluation_mode's stance; when this fails, torch has changed and it may go."""
    model, x = compile_net(Wrapped()), torch.randn(4, 6)
    with torch.no_grad():
        model(x)
        tap = HeadTap(model, "net.fc")
        with tap.capture():
            model(x)
            with pytest.raises(HeadError, match="was not called"):
                tap.take()


def test_the_stance_is_restored():
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    model, x = torch.compile(MLP(), backend=backend), torch.randn(4, 6)
    with evaluation_mode(model):
        model(x)
    with pytest.raises(RuntimeError, match="shapes"), evaluation_mode(model):
        model(torch.randn(4, 7))
    assert not traced
    model(x)
    assert traced


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_hides_its_head():
    model = Wrapped()
    model.net, model.outer = torch.jit.script(model.net), nn.Linear(2, 2)
    with pytest.raises(HeadError, match=r"No nn.Linear was executed.*torch.jit.script"):
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))
    for names in ({"head": "net.fc"}, {"head": "outer", "embedding": "net.body"}):
        with pytest.raises(HeadError, match=r"=.net.* is part of a torch.jit.script.*before it is compiled"):
            HeadTap(model, **names)


# -- evaluation mode


def test_evaluation_mode_restores_every_modules_own_mode():
    model = Returning(lambda h, o: o).train()
    model.net.body.eval()  # as one freezes a backbone
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    x = torch.randn(4, 6)
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not model(x).requires_grad
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="stop"), evaluation_mode(model):
        raise ValueError("stop")
    assert {name: module.training for name, module in model.named_modules()} == before


def test_evaluation_mode_switches_off_dropout_and_batch_statistics():
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(6)).train(), torch.randn(4, 6)
    with evaluation_mode(model):
        assert torch.equal(model(x), model(x))
    assert model[1].num_batches_tracked == 0
    assert model.training


@pytest.mark.parametrize(
    ("argument", "name", "meant"), [("embedding", "net.bodies", "net.body"), ("head", "net.fcc", "net.fc")]
)
def test_the_name_that_was_meant_is_suggested(argument, name, meant):
    with pytest.raises(HeadError, match=f"Did you mean '{re.escape(meant)}'"):
        HeadTap(Returning(lambda h, o: o), **{"head": "net.fc", argument: name})
