"""Nothing may change the values between the head and what the model returns, and the rehearsal says so."""

import re

import pytest
import torch
from torch import nn

from lightning_resmem import HeadError, LocalMemory, ResMemCallback, memorize
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.returned import check_returned
from lightning_resmem.tasks import Regression
from tests.models import CallsSelf, Data, Flat, NoForward, Numbers, make, memory_for, trainer


@pytest.fixture
def output():
    return torch.randn(4, 3)


@pytest.fixture
def embedding():
    return torch.randn(4, 6)


ALLOWED = {
    "the values": lambda z, o: o,
    "softmax": lambda z, o: o.softmax(1),
    "log_softmax in bfloat16": lambda z, o: o.log_softmax(1).bfloat16(),
    "sigmoid in a dict": lambda z, o: {"loss": torch.tensor(1.5), "p": o.sigmoid()},
    "beside others of its shape": lambda z, o: (o * 3, o),
    "labels": lambda z, o: o.argmax(1),
    "labels as numbers": lambda z, o: (o > 0).float(),
    "top-1 probability": lambda z, o: o.softmax(1).max(1).values,
    "one of the classes": lambda z, o: o.softmax(1)[:, 1],
    "the embedding": lambda z, o: z,
    "the embedding in a tuple": lambda z, o: (z, o.argmax(1)),
    "a loss": lambda z, o: o.square().mean(),
    "nothing": lambda z, o: None,
    "text": lambda z, o: ["a", "b", "c", "d"],
}


@pytest.mark.parametrize("returned", ALLOWED.values(), ids=ALLOWED)
def test_the_same_and_what_cannot_be_compared_is_allowed(returned, embedding, output):
    check_returned(nn.Linear(6, 3), "fc", embedding, output, returned(embedding, output))


def test_an_embedding_as_wide_as_the_output_is_not_taken_for_it(output):
    embedding = torch.randn(4, 3)
    check_returned(nn.Linear(3, 3), "fc", embedding, output, {"features": embedding, "labels": output.argmax(1)})


@pytest.mark.parametrize("returned", [lambda o: o[:, 0], lambda o: o[:, 0].sigmoid(), lambda o: o[:, 0].round()])
def test_one_output_may_be_squeezed(returned, embedding):
    output = torch.randn(4, 1)
    check_returned(nn.Linear(6, 1), "fc", embedding, output, returned(output))


@pytest.mark.parametrize("follows", [torch.sigmoid, nn.functional.softplus, torch.exp, torch.relu])
def test_of_numbers_nothing_may_follow(follows, embedding, output):
    name = follows.__name__
    with pytest.raises(HeadError, match=rf"{name} follows the head\. .*and of regression nothing\. Make .* a part of"):
        check_returned(nn.Linear(6, 3), "fc", embedding, output, follows(output), compare_numbers=True)
    check_returned(nn.Linear(6, 3), "fc", embedding, output, (follows(output), output), compare_numbers=True)


def test_a_regression_whose_head_is_followed_by_a_sigmoid(tmp_path):
    class Squashed(Numbers):
        def forward(self, x):
            return super().forward(x).sigmoid()

    class Whole(Numbers):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(self.head, nn.Sigmoid())

    with pytest.raises(HeadError, match=r"head 'head' does: sigmoid follows the head.*nn\.Sequential\(self\.fc"):
        memorize(trainer(tmp_path), make(Squashed), Data("regression"), memory=memory_for(Squashed))
    combined = memorize(trainer(tmp_path), make(Whole), Data("regression"), memory=memory_for(Whole), head="head")
    assert len(combined.memory) == 120


FOLLOWS = {
    "scaled": (lambda o: 16 * o, "multiplied by 16. "),
    "scaled and shifted": (lambda o: 3.5 * o - 2, "multiplied by 3.5 plus -2. "),
    "shifted": (lambda o: o + 2, "multiplied by 1 plus 2. "),
    "in a dict": (lambda o: {"logits": o / 2}, "multiplied by 0.5. "),
    "priors": (lambda o: o + torch.tensor([0.5, 0.3, 0.2]).log(), "a constant added to each of its outputs"),
    "softmax of another temperature": (lambda o: (o / 4).softmax(1), "something follows the head"),
    "rectified": (lambda o: o.relu() + 0.25, "something follows the head"),
}


@pytest.mark.parametrize(("returned", "message"), FOLLOWS.values(), ids=FOLLOWS)
def test_what_follows_the_head_is_named(returned, message, embedding, output):
    with pytest.raises(HeadError, match=f"other values than its head 'fc' does: .*{re.escape(message)}.*head=\"head\""):
        check_returned(nn.Linear(6, 3), "fc", embedding, output, returned(output))


def test_a_scaled_single_output_is_named(embedding):
    output = torch.randn(4, 1)
    with pytest.raises(HeadError, match="multiplied by 16"):
        check_returned(nn.Linear(6, 1), "fc", embedding, output, 16 * output[:, 0])


def test_a_head_that_is_looked_for_says_what_follows_it():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model.forward = lambda x: 16 * model[1](model[0](x))
    with pytest.raises(HeadError, match=r"head is uncertain.*that of '1', but multiplied by 16\. .*nn.Sequential"):
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))


def test_something_that_follows_the_head_and_cannot_be_named():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    model.forward = lambda x: nn.functional.normalize(model[1](model[0](x)))
    with pytest.raises(HeadError, match=r"head='1'\. If .* made of that of '1', something follows .*nn\.Sequential"):
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))


def test_no_linear_module_is_proposed_where_none_makes_as_many_numbers():
    model, prototypes = nn.Sequential(nn.Linear(6, 5)), torch.randn(5, 3)
    model.forward = lambda x: model[0](x) @ prototypes
    with pytest.raises(HeadError, match=r"None of these makes as many .*self\.head = MyHead") as raised:
        HeadTap.find(model, lambda: model(torch.randn(4, 6)))
    assert "head='0'" not in str(raised.value)


def test_the_head_of_a_forward_fn_is_the_one_whose_output_it_returns():
    model = nn.ModuleDict({"body": nn.Linear(6, 5), "head": nn.Linear(5, 3), "auxiliary": nn.Linear(5, 3)})

    def run():
        hidden = model["body"](torch.ones(4, 6))
        outputs = model["head"](hidden)
        model["auxiliary"](hidden)
        return outputs

    assert HeadTap.find(model, run, returns_outputs=False).head == "head"
    assert HeadTap.find(model, lambda: (run(), None)[1], returns_outputs=False).head == "auxiliary"


# -- before training


class Scaled(Numbers):
    """Outputs are rescaled in `forward`."""

    def forward(self, x):
        return 16 * super().forward(x)


class Priors(CallsSelf):
    """Class priors are added in `forward`."""

    def forward(self, x):
        return super().forward(x) + torch.tensor([0.4, 0.3, 0.2, 0.1]).log()


class Part(Numbers):
    """The way out for `Scaled`: what follows the head is part of it."""

    def __init__(self):
        super().__init__(lr=1e-4)
        self.head = nn.Sequential(nn.Linear(5, 2), Times16())


class Times16(nn.Module):
    def forward(self, x):
        return 16 * x


@pytest.mark.parametrize("kind", [Scaled, Priors])
@pytest.mark.parametrize("head", [None, "head"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_is_refused_before_training(kind, head, precision, tmp_path):
    model, steps = make(kind), []
    model.training_step = lambda *args: steps.append(args)
    callback = ResMemCallback(memory_for(kind), head=head)
    with pytest.raises(HeadError, match="multiplied by 16" if kind is Scaled else "constant added|something follows"):
        trainer(tmp_path, callback, precision=precision).fit(model, datamodule=Data(kind.task))
    assert not steps


def test_a_forward_fn_that_returns_something_else_is_refused(tmp_path):
    data, model = Data(), make(CallsSelf)
    with pytest.raises(HeadError, match=r"'head' does: multiplied by 0\.5"):
        memorize(trainer(tmp_path), model, data, forward_fn=lambda model, batch: model(batch[0]) / 2)


def test_a_step_that_returns_something_else_is_refused(tmp_path):
    class Halved(NoForward):
        def predict_step(self, batch, batch_idx):
            return super().predict_step(batch, batch_idx) / 2

    with pytest.raises(HeadError, match=r"'head' does: multiplied by 0\.5"):
        memorize(trainer(tmp_path), make(Halved), Data())


def test_what_follows_may_be_part_of_the_head(tmp_path):
    data, model = Data("regression"), make(Part)
    callback = ResMemCallback(memory_for(Part), head="head")
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    callback.memory.params = callback.memory.params.__class__(k=1, sigma=1.0)
    (logged,) = run.test(model, data.loader(data.train), verbose=False)
    assert logged["test_score"] == pytest.approx(0, abs=1e-6)  # the nearest row is the row itself


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("form", ["logits", "softmax", "labels", "dict"])
def test_in_every_precision_the_same_is_the_same(precision, form, tmp_path):
    class Returns(CallsSelf):
        def forward(self, x):
            outputs = super().forward(x)
            return {
                "logits": outputs.float(),
                "softmax": outputs.softmax(dim=1),
                "labels": outputs.argmax(dim=1),
                "dict": {"logits": outputs},
            }[form]

    resmem = memorize(
        trainer(tmp_path, precision=precision), make(Returns), Data(), memory=memory_for(CallsSelf), head="head"
    )
    assert len(resmem.memory) == 120


def test_a_squeezed_regression_is_allowed_and_answered_in_its_shape(tmp_path):
    torch.manual_seed(0)
    data, model = Data(), Flat()
    targets = data.train[1].float()
    loader = data.loader((data.train[0], targets))
    resmem = memorize(trainer(tmp_path), model, loader, memory=LocalMemory(Regression()))
    resmem.memory.params = resmem.memory.params.__class__(k=1, sigma=1.0)
    found = resmem(data.train[0])
    assert found.shape == model(data.train[0]).shape == (120,)
    torch.testing.assert_close(found, targets)
    assert resmem.predictions((data.train[0], targets)).resmem.shape == (120, 1)
