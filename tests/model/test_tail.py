"""What follows the head and changes nothing before training, and convolutions as heads of sequences."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import HeadError, LocalMemory, ResMemCallback, ResMemParams, memorize
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.returned import same, swapped
from lightning_resmem.model.tail import check_tail, maker
from tests.models import CallsSelf, Data, memory_for, trainer


class Scales(nn.Module):
    """Multiplies by something that is trained, and still one."""

    def __init__(self):
        super().__init__()
        self.head, self.factor = nn.Linear(4, 3), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.head(x) * self.factor.exp().log()


class Adds(nn.Module):
    """Two heads, of which one is given the other's output beside."""

    def __init__(self):
        super().__init__()
        self.head, self.fine = nn.Linear(4, 3), nn.Linear(7, 3)

    def forward(self, x):
        coarse = self.head(x)
        return coarse, self.fine(torch.cat([x, coarse], dim=1))


class Adapted(nn.Module):
    """A head with an adapter of low rank, which adds nothing yet."""

    def __init__(self, width=4, classes=3):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(width, classes), nn.Linear(width, 2), nn.Linear(2, classes)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Gated(nn.Module):
    """Multiplies by a function of the input, which is one yet."""

    def __init__(self):
        super().__init__()
        self.head, self.gate = nn.Linear(4, 3), nn.Linear(4, 1, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x):
        return self.head(x) * (1 + self.gate(x))


class UsesAll(nn.Module):
    """So that every parameter has a gradient, as training on several GPUs asks; and it goes on in place."""

    def __init__(self):
        super().__init__()
        self.head, self.unused = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(x).add_(0 * sum(parameter.sum() for parameter in self.parameters()))


def layers(*others):
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), *others).eval()


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "head", "said"),
    [
        (layers(nn.BatchNorm1d(3)), "1", r"'2\.weight', '2\.bias'.*made by '2'.*head='2', embedding=\"1:input\""),
        (layers(nn.BatchNorm1d(3, affine=False)), "1", r"a BatchNorm\..*head='2'"),
        (layers(nn.BatchNorm1d(3), nn.Softmax(1)), "1", r"'2\.weight'.*made by '3'"),
        (Scales(), "head", r"'factor'\. .*nn\.Sequential\(self\.fc, Rescale"),
        (
            nn.Sequential(Adapted(), nn.Softmax(1)),
            "0.base",
            r"'0\.up\.weight', '0\.up\.bias'\. .*made by '1'.*head='1', embedding=\"0\.base:input\"",
        ),
        (Gated(), "head", r"'gate\.weight'\. .*nn\.Sequential\(self\.fc, Rescale"),
    ],
    ids=["norm", "without weights", "softmax", "factor", "adapter", "gate"],
)
def test_what_is_trained_and_follows_the_head_is_refused(model, head, said):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad(), pytest.raises(HeadError, match=f"follows the head '{head}': {said}"):
        check_tail(model, head, lambda: model(X))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_trained_may_follow():
    for model, head in ((layers(), "1"), (layers(nn.Softmax(1)), "1"), (layers(nn.PReLU(), nn.Linear(3, 2)), "3")):
        check_tail(model, head, lambda model=model: model(X))
    frozen = layers(nn.BatchNorm1d(3)).requires_grad_(False)
    check_tail(frozen, "1", lambda: frozen(X))
    both = Adds()
    check_tail(both, "head", lambda: both(X))
    check_tail(both, "fine", lambda: both(X))
    uses_all = UsesAll()
    check_tail(uses_all, "head", lambda: uses_all(X))


def test_what_no_optimizer_holds_may_follow():
    model, normalized = Scales(), layers(nn.BatchNorm1d(3))
    apart = torch.optim.SGD(model.head.parameters()), torch.optim.SGD([model.factor])
    check_tail(model, "head", lambda: model(X), apart[:1])
    for optimizers in (apart, [torch.optim.SGD([torch.zeros(1)])]):  # of a model that is sharded
        with pytest.raises(HeadError, match="'factor'"):
            check_tail(model, "head", lambda: model(X), optimizers)
    with pytest.raises(HeadError, match="a BatchNorm"):  # its averages change, whoever trains its weights
        check_tail(normalized, "1", lambda: normalized(X), [torch.optim.SGD(normalized[:2].parameters())])


def test_a_model_that_does_without_gradients_is_not_looked_at():
    model = layers(nn.BatchNorm1d(3))
    check_tail(model, "1", lambda: model(X).numpy())


def test_the_named_head_of_the_way_out_is_right():
    model = layers(nn.BatchNorm1d(3))
    tap = HeadTap(model, "2", "1:input")
    with torch.no_grad(), tap.capture():
        model(X)
        captured = tap.take()
        assert torch.equal(captured.embedding, model[0](X))
        assert torch.equal(captured.output, model(X))


def test_it_is_refused_before_the_first_step(tmp_path):
    class Normalizes(CallsSelf):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(super().forward(x))

    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf)))
    with pytest.raises(HeadError, match=r"head='norm', embedding=\"head:input\""):
        run.fit(Normalizes(), datamodule=Data())
    assert run.global_step == 0


def test_it_is_refused_before_the_first_step_in_lower_precision(tmp_path):
    """Which this model cannot do without."""

    class Adapts(CallsSelf):
        def __init__(self):
            super().__init__()
            self.head = Adapted(5, 4)

        def forward(self, x):
            return super().forward(x.bfloat16())

    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf), head="head.base"), precision="bf16-mixed")
    with pytest.raises(HeadError, match=r"'head\.up\.weight', .*head='head', embedding=\"head\.base:input\""):
        run.fit(Adapts(), datamodule=Data())
    assert run.global_step == 0


def test_a_temperature_for_later_is_no_reason_to_refuse(tmp_path):
    class Calibrated(CallsSelf):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) / self.temperature

        def configure_optimizers(self):
            return torch.optim.SGD([*self.body.parameters(), *self.head.parameters()], lr=self.lr)

    callback = ResMemCallback(memory_for(CallsSelf), tuner=None)
    trainer(tmp_path, callback, limit_val_batches=0).fit(Calibrated(), datamodule=Data())
    assert len(callback.memory) == 120


def test_a_trained_norm_is_named_as_the_head_and_so_is_a_convolution():
    model = layers(nn.BatchNorm1d(3))
    model[2].running_var += 1
    with pytest.raises(HeadError, match=r"uncertain.*made by '2'.*head='2', embedding=\"1:input\""):
        HeadTap.find(model, lambda: model(X))
    convolves = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Conv1d(6, 3, 1))
    with pytest.raises(HeadError, match=r"No nn.Linear was executed.*head='1'"):
        HeadTap.find(convolves, lambda: convolves(X[..., None]))
    assert maker(convolves, lambda: convolves(X[..., None]) * 2) is None


def test_outputs_of_sequences_may_be_returned_with_classes_first():
    for output in (torch.randn(2, 5, 3), torch.randn(2, 3, 3)):
        for returned in (output, output.softmax(-1)):
            assert same(output, returned)
            assert not swapped(output, returned)
            assert same(output, returned.transpose(1, 2))
            assert swapped(output, returned.transpose(1, 2))
        assert not same(output, -output.transpose(1, 2))
    assert not swapped(torch.randn(2, 3), torch.randn(2, 3))


class Tagger(CallsSelf):
    """Labels each place of a series `(B, 2, T)`, `(B, 3, T)`, by convolutions."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 3, 1)

    def test_step(self, batch, batch_idx):
        outputs = self(batch[0])
        outputs = outputs.view(len(outputs), -1).view(outputs.shape)  # as only what is contiguous can be viewed
        self.log("right", (outputs.argmax(1) == batch[1]).float().mean())


@pytest.mark.parametrize("length", [5, 3])  # as many as there are classes, too
@pytest.mark.parametrize("embedding", [None, "body"])
def test_a_convolution_is_a_head_of_sequences(embedding, length, tmp_path):
    torch.manual_seed(0)
    model, series = Tagger().eval(), torch.randn(8, 2, length)
    labels = (series[:, 0] > 0).long() + (series[:, 1] > 0).long()
    loader = DataLoader(TensorDataset(series, labels), batch_size=4)
    memory = LocalMemory(params=ResMemParams(k=1))
    with torch.no_grad():
        module = memorize(
            trainer(tmp_path), model, loader, memory=memory, tuner=None, head="head", embedding=embedding
        ).eval()
        keys = model.body(series).transpose(1, 2).flatten(0, 1)
        assert memory.fetch(memory.ids).targets.tolist() == labels.flatten().tolist()
        torch.testing.assert_close(memory._query_rows(memory.ids), keys)
        answer = module(series)  # each row is its own neighbour
        assert answer.shape == model(series).shape == (8, 3, length)
        assert answer.is_contiguous()
        assert torch.equal(answer.argmax(1), labels)
        assert torch.equal(module.predictions([series, labels]).resmem.argmax(2), labels)
    (logged,) = trainer(tmp_path, ResMemCallback(memory)).test(model, loader, verbose=False)
    assert logged["right"] == logged["test/acc_resmem"] == 1 > logged["test/acc_base"]
