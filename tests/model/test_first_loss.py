"""Steps that rescale outputs or targets are told by the loss of the first training step."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_resmem import HeadError, InputError, LocalMemory, ResMemCallback, ResMemParams
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.first_loss import FirstLoss
from lightning_resmem.tasks import Multiclass, Regression
from tests.models import (
    CallsSelf,
    Data,
    Embeds,
    Flat,
    Numbers,
    Spy,
    hooks_on,
    make,
    memory_for,
    same_weights,
    trainer,
    weights_of,
)

MEAN, SCALE = torch.tensor([5.0, -3.0]), torch.tensor([9.0, 2.0])


class Standardised(Numbers):
    """Targets are standardised in the steps, which take it back for the score."""

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, (targets - MEAN) / SCALE)

    def score(self, outputs, targets):
        return F.mse_loss(outputs * SCALE + MEAN, targets)


class Rescaled(Numbers):
    """Outputs are rescaled in the steps."""

    def loss(self, outputs, targets):
        return F.huber_loss(outputs * SCALE + MEAN, targets) + 0.1 * outputs.square().mean()


class SameUnits(Numbers):
    """Both are divided alike: the head is in the units of the targets."""

    def loss(self, outputs, targets):
        return F.mse_loss((outputs - MEAN) / SCALE, (targets - MEAN) / SCALE)


class Noise(Numbers):
    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets + torch.randn_like(targets))


class ByColumns(Numbers):
    """A loss of its own, of which nothing can be told."""

    def loss(self, outputs, targets):
        return sum(((outputs[:, i] / 2 - targets[:, i]) ** 2).mean() for i in range(2))


class Auxiliary(Numbers):
    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets) + F.l1_loss(outputs, targets / 100)


class Manual(Standardised):
    """Steps its optimizer itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)


class Adjusted(CallsSelf):
    """Its loss, and nothing else, knows how frequent the classes are."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs + torch.tensor([0.7, 0.1, 0.1, 0.1]).log(), targets, label_smoothing=0.1)


class SelfSupervised(CallsSelf):
    """A loss on labels of its own, of another width."""

    def loss(self, outputs, targets):
        rows = torch.arange(len(outputs), device=outputs.device)
        return F.cross_entropy(outputs, targets) + F.cross_entropy(outputs @ outputs.T, rows)


def fit(kind, root, *callbacks, data=None, **options):
    torch.manual_seed(0)
    model, steps = make(kind), []
    spy = Spy("on_train_batch_end", lambda *_: steps.append(1))
    callback = ResMemCallback(LocalMemory(memory_for(kind).task, ResMemParams(k=5, sigma=0.2)), **options)
    return model, steps, callback, trainer(root, spy, callback, *callbacks), Data(kind.task)


@pytest.mark.parametrize("kind", [Standardised, Rescaled, Manual])
def test_other_units_are_refused_in_the_first_step(kind, tmp_path):
    model, steps, _, run, data = fit(kind, tmp_path)
    said = {
        Rescaled: r"compares 9 \* output \+ 5 with 1 \* target \+ .*",
        Standardised: r"compares 1 \* output \+ .* with 0\.1111 \* target \+ -0\.5556\. .*",
    }[kind if kind is not Manual else Standardised]
    with pytest.raises(InputError, match=rf"head 'head' and the targets are in different units: .*{said}targets_fn"):
        run.fit(model, datamodule=data)
    assert not steps
    assert hooks_on(model) == 0


def test_the_ways_out_give_the_right_numbers(tmp_path):
    """With the targets as the loss is given them, the steps that take the scaling back see the right prediction."""
    options = {"targets_fn": lambda batch: (batch[1] - MEAN) / SCALE}
    model, _, callback, run, data = fit(Standardised, tmp_path, **options)
    run.fit(model, datamodule=data)
    callback.memory.params = ResMemParams(k=1, sigma=1.0)
    (logged,) = run.test(model, data.loader(data.train), verbose=False)
    assert logged["test_score"] == pytest.approx(0, abs=1e-8)  # the nearest row is the row itself


@pytest.mark.parametrize("kind", [Numbers, SameUnits, Noise, ByColumns, Auxiliary, Adjusted, SelfSupervised])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_others_are_trained_as_without_us(kind, precision, tmp_path):
    found = []
    for watched in (True, False):
        model, _, callback, _, data = fit(kind, tmp_path)
        run = trainer(tmp_path, *([callback] if watched else []), precision=precision)
        torch.manual_seed(1)
        run.fit(model, datamodule=data)
        found.append(weights_of(model))
        assert hooks_on(model) == 0
    assert same_weights(*found)


def test_a_squeezed_regression(tmp_path):
    class Scaled(Flat):
        def loss(self, outputs, targets):
            return F.smooth_l1_loss(self.factor * outputs, targets)

    data = Data()
    loader = data.loader((data.train[0], data.train[1].float()))
    for factor in (1, 2):
        model = make(Scaled)
        model.factor = factor
        run = trainer(tmp_path, ResMemCallback(LocalMemory(Regression())))
        if factor == 1:
            run.fit(model, loader)
        else:
            with pytest.raises(InputError, match=r"compares 2 \* output \+ "):
                run.fit(model, loader)


def test_an_embedding_in_the_place_of_the_logits(tmp_path):
    model, steps, _, run, data = fit(Embeds, tmp_path)
    with pytest.raises(
        HeadError, match=r"head 'body.2' makes outputs of width 12, .* 4 with the labels.*head='head'.*model\.head\("
    ):
        run.fit(model, datamodule=data)
    assert not steps
    model, steps, _, run, data = fit(Embeds, tmp_path, forward_fn=lambda model, batch: model.head(model(batch[0])))
    run.fit(model, datamodule=data)
    assert steps


class MapsLabels(CallsSelf):
    """Labels are mapped in the steps."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, 3 - targets)


class MixesLabels(CallsSelf):
    """Mixup's second half alone: labels of other rows."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets.roll(1))


class MapsBeside(CallsSelf):
    """An auxiliary loss on mapped labels, which says nothing of the head's own."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, 3 - targets) + F.cross_entropy(outputs, targets, label_smoothing=0.1)


def test_labels_that_the_steps_map_are_refused_in_the_first_step(tmp_path):
    model, before = make(MapsLabels), weights_of(make(MapsLabels))
    with pytest.raises(InputError, match=r"trained on other labels than those of the batch: 0 is 3.*give a targets_fn"):
        trainer(tmp_path, ResMemCallback(memory_for(MapsLabels))).fit(model, datamodule=Data())
    assert same_weights(weights_of(model), before)
    callback = ResMemCallback(memory_for(MapsLabels), targets_fn=lambda batch: 3 - batch[1])
    trainer(tmp_path, callback).fit(model, datamodule=(data := Data()))
    assert torch.equal(callback.memory.fetch(callback.memory.ids).targets, 3 - data.train[1])


@pytest.mark.parametrize("kind", [MixesLabels, MapsBeside])
def test_labels_that_are_no_others_are_trained_on(kind, tmp_path):
    callback = ResMemCallback(memory_for(kind))
    trainer(tmp_path, callback).fit(make(kind), datamodule=Data())
    assert len(callback.memory) == 120


class IgnoresByArgument(CallsSelf):
    """Its loss ignores a label, of which only an argument knows."""

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, ignore_index=255)


def test_a_targets_fn_that_marks_what_the_loss_ignores(tmp_path):
    data, callback = Data(), ResMemCallback(memory_for(IgnoresByArgument), targets_fn=marked)
    for _, targets in (data.train, data.val):
        targets[::5] = 255
    trainer(tmp_path, callback).fit(make(IgnoresByArgument), datamodule=data)
    assert callback.memory.ids.tolist() == [row for row in range(120) if row % 5]


def marked(batch):
    return batch[1].where(batch[1] != 255, -100)


def said_of(watching, model, batch, step):
    """The error of a step on a batch, which leaves no hooks; None without one."""
    try:
        watching.watch(batch)
        watching.check(step())
        return None
    except (InputError, HeadError) as error:
        return str(error)
    finally:
        watching.close()
        assert hooks_on(model) == 0


def look(loss, kind=Numbers, rows=32, head="head", missing=0):
    """What is said of a step with this loss of outputs and targets, of which the first are missing."""
    model, data = make(kind), Data(kind.task)
    model.loss = loss
    watching = FirstLoss(model, head, BatchReader(), Regression() if kind.task == "regression" else None)
    batch = data.train[0][:rows], data.train[1][:rows]
    if missing:
        batch[1][:missing] = torch.nan
    return said_of(watching, model, batch, lambda: model.training_step(batch, 0))


def test_outputs_that_are_logarithms():
    said = look(lambda outputs, targets: F.poisson_nll_loss(outputs, targets.abs()))
    assert "takes the exponential of what the head 'head' returns, as F.poisson_nll_loss does" in said
    assert "log_input=False" in said
    assert look(lambda outputs, targets: F.poisson_nll_loss(outputs.relu() + 1, targets, log_input=False)) is None
    assert look(lambda outputs, targets: (outputs - targets).cosh().log().mean()) is None


def test_targets_that_the_step_masks():
    def masked(outputs, targets):
        there = ~targets.isnan()
        return F.mse_loss(outputs[there], targets[there])

    assert "6 of 32 rows of the first training batch have targets that are NaN or infinite" in look(masked, missing=6)
    assert look(masked, missing=3) is None


def mapped(y):
    return y.sign() * y.abs().sqrt()


HAND_WRITTEN = {
    "square": lambda difference: (difference**2).mean(),
    "method": lambda difference: difference.square().sum(),
    "product": lambda difference: (difference * difference).mean(),
    "absolute": lambda difference: difference.abs().mean(),
    "norm": lambda difference: torch.linalg.vector_norm(difference, dim=1).mean(),
    "weighted": lambda difference: (torch.rand(len(difference), 1) * difference.square()).sum() / 7,
}


@pytest.mark.parametrize("hand", HAND_WRITTEN.values(), ids=HAND_WRITTEN)
def test_losses_that_are_written_by_hand(hand):
    assert look(lambda outputs, targets: hand(outputs - targets)) is None
    assert look(lambda outputs, targets: hand(3 * (targets - outputs))) is None
    assert look(lambda outputs, targets: hand(outputs - targets - torch.randn_like(targets))) is None
    assert " with 0.5 * target + " in look(lambda outputs, targets: hand(outputs - targets / 2))
    assert "compares 9 * output + 5 with 1 * target + " in look(lambda o, t: hand(o * SCALE + MEAN - t))
    assert "compares 9 * output + 5 with 1 * target + " in look(lambda o, t: hand(t - o * SCALE - MEAN))
    for difference in (lambda o, t: o - torch.log1p(t), lambda o, t: mapped(t) - o):
        said = look(lambda outputs, targets: hand(difference(outputs, targets)))  # noqa: B023
        assert "is trained on other targets than those of the batch: 3 is 1." in said
        assert "targets_fn=lambda batch: ..." in said


@pytest.mark.parametrize("loss", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_targets_and_outputs_that_a_step_maps(loss):
    said = look(lambda outputs, targets: loss(outputs, torch.log1p(targets)))
    assert "trained on other targets than those of the batch: 3 is 1.386 in the loss of the first" in said
    assert "give targets_fn=lambda batch: ... that returns them" in said
    said = look(lambda outputs, targets: loss(outputs.exp(), targets))
    assert "Something follows the head 'head' in the steps: its output " in said
    assert 'self.head = nn.Sequential(self.fc, nn.Sigmoid()) with head="head"' in said
    assert look(lambda outputs, targets: loss(outputs.relu(), targets)) is None  # a clamp keeps the units
    assert look(lambda outputs, targets: loss(outputs.sinh(), targets.log1p())) is None  # both: nobody knows
    assert look(lambda outputs, targets: loss(outputs, targets) + loss(outputs, mapped(targets))) is None


class TwoHeads(CallsSelf):
    """Runs the auxiliary head last, and has no forward that would tell."""

    def __init__(self):
        super().__init__()
        self.head, self.main = nn.Linear(5, 4), nn.Linear(5, 4)

    def outputs(self, batch):
        hidden = self.body(batch[0])
        main, self.auxiliary = self.main(hidden), self.head(hidden)
        return main


def test_the_head_whose_output_the_loss_gets_is_named():
    said = look(F.cross_entropy, TwoHeads)
    assert "compares the output of 'main' with them. Name that one: head='main'" in said
    assert look(F.cross_entropy, TwoHeads, head="main") is None


TEXT = torch.randint(1, 9, (4, 6), generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Two heads at each position, of which the first is asked last."""

    def __init__(self, columns=9):
        super().__init__()
        self.embed, self.aux, self.head = nn.Embedding(99, 8), nn.Linear(8, columns), nn.Linear(8, columns)

    def forward(self, tokens):
        states = self.embed(tokens)
        return self.aux(states), self.head(states)


class Convolved(Tokens):
    """Heads that return `(B, C, T)`."""

    def __init__(self, columns=9):
        super().__init__()
        self.aux, self.head = nn.Conv1d(8, columns, 1), nn.Conv1d(8, columns, 1)

    def forward(self, tokens):
        states = self.embed(tokens).transpose(1, 2)
        return self.aux(states), self.head(states)


def look_at_tokens(loss, batch, task=None, columns=9, kind=Tokens, **options):
    """What is said of a step with this loss of the two heads' outputs."""
    torch.manual_seed(0)
    model = kind(columns)
    watching = FirstLoss(model, "head", BatchReader(**options), task or Multiclass())
    return said_of(watching, model, batch, lambda: loss(*model(TEXT)))


def entropy(outputs, labels):
    return F.cross_entropy(outputs.reshape(-1, 9), labels.flatten())


FOLLOWING = F.pad(TEXT[:, 1:], (0, 1), value=-100)
# Three ways to write the loss of the next token.
NEXT_TOKEN = {
    "shorter": lambda outputs: entropy(outputs[:, :-1], TEXT[:, 1:]),
    "padded": lambda outputs: entropy(outputs, FOLLOWING),
    "by classes": lambda outputs: F.cross_entropy(outputs.transpose(1, 2), FOLLOWING),
}


@pytest.mark.parametrize("next_token", NEXT_TOKEN.values(), ids=NEXT_TOKEN)
def test_labels_of_other_positions_than_are_memorized(next_token):
    def loss(_, outputs):
        return next_token(outputs)

    # Labels that are the entry `input_ids`, or the first of a pair, are moved; it cannot be told of other names.
    assert look_at_tokens(loss, {"input_ids": TEXT, "labels": TEXT}) is None
    assert look_at_tokens(loss, {"words": TEXT, "labels": FOLLOWING}) is None
    assert look_at_tokens(loss, {"words": TEXT}, targets_fn=lambda batch: FOLLOWING) is None
    said = look_at_tokens(loss, {"words": TEXT, "labels": TEXT})
    assert "the head 'head' returns at a position with the label of the next one, but a memory of the batch" in said
    assert "would hold that of the same one there" in said
    assert "targets_fn=lambda batch: ..." in said


def test_tokens_that_are_to_be_repeated_and_not_continued():
    said = look_at_tokens(lambda _, outputs: entropy(outputs, TEXT), (TEXT, TEXT))
    assert "with the label of the same one, but a memory of the batch would hold that of the next one" in said
    assert look_at_tokens(lambda _, outputs: entropy(outputs, TEXT), (TEXT, TEXT), targets_fn=lambda b: b[1]) is None


def test_labels_of_tokens_that_the_step_maps_and_another_head():
    batch = {"words": TEXT, "labels": TEXT}
    assert look_at_tokens(lambda _, outputs: entropy(outputs, TEXT), batch) is None
    said = look_at_tokens(lambda _, outputs: entropy(outputs, 8 - TEXT), batch)
    assert "trained on other labels than those of the batch: 1 is 7 in the loss" in said
    said = look_at_tokens(lambda _, outputs: entropy(outputs[TEXT > 3], 8 - TEXT[TEXT > 3]), batch | {"labels": KEPT})
    assert "trained on other labels than those of the batch: 5 is 3 in the loss" in said
    said = look_at_tokens(lambda aux, outputs: entropy(aux, TEXT), batch)
    assert "compares the output of 'aux' with them. Name that one: head='aux'" in said
    assert look_at_tokens(lambda aux, outputs: entropy(aux, TEXT) + entropy(outputs, TEXT), batch) is None
    said = look_at_tokens(lambda _, outputs: entropy(outputs, TEXT.flip(0)), batch | {"labels": TEXT + 50})
    assert "In the batch of the first training step: targets holds 5" in said
    assert "outside [0, 9)" in said


KEPT = TEXT.where(TEXT > 3, -100)


def test_numbers_of_each_position_in_other_units():
    numbers = torch.randn(4, 6, 2)
    batch = {"words": TEXT, "targets": numbers}
    for loss in (F.mse_loss, lambda outputs, targets: ((outputs - targets) ** 2).mean()):
        assert look_at_tokens(lambda _, o: loss(o, numbers), batch, Regression(), 2) is None  # noqa: B023
        said = look_at_tokens(lambda _, o: loss(3 * o + 1, numbers), batch, Regression(), 2)  # noqa: B023
        assert "compares 3 * output + 1 with 1 * target + " in said


@pytest.mark.parametrize("columns", [9, 6])  # as many as there are positions, too
def test_a_convolution_is_looked_at_by_its_positions(columns):
    labels, options = TEXT % columns, {"columns": columns, "kind": Convolved}
    batch = {"words": TEXT, "labels": labels}
    assert look_at_tokens(lambda _, outputs: F.cross_entropy(outputs, labels), batch, **options) is None
    said = look_at_tokens(lambda _, outputs: F.cross_entropy(outputs, columns - 1 - labels), batch, **options)
    assert "trained on other labels than those of the batch" in said
    numbers = torch.randn(4, 6, columns, generator=torch.Generator().manual_seed(0))
    batch = {"words": TEXT, "targets": numbers}
    for loss in (F.mse_loss, lambda outputs, targets: ((outputs - targets) ** 2).mean()):

        def scaled(_, outputs):
            return loss(torch.arange(1, columns + 1)[:, None] * outputs, numbers.transpose(1, 2))  # noqa: B023

        said = look_at_tokens(scaled, batch, Regression(), **options)
        assert "compares 2 * output + " in said
        assert "with 1 * target + " in said
        assert look_at_tokens(lambda _, o: loss(o, numbers.transpose(1, 2)), batch, Regression(), **options) is None  # noqa: B023
