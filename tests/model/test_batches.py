"""Targets and inputs of all kinds of batches, and models that are run through their steps without a trace."""

import dataclasses
import re
from collections import UserDict, namedtuple

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from lightning_resmem.errors import HeadError, InputError
from lightning_resmem.model.batches import BatchReader, borrow_transfer_hooks
from lightning_resmem.model.head import HeadTap

X, Y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0])


@dataclasses.dataclass
class Rows:
    image: torch.Tensor
    label: torch.Tensor
    index: int = 0


@dataclasses.dataclass
class Unlabelled:
    image: torch.Tensor


NamedPair = namedtuple("NamedPair", "inputs outcome")
Swapped = namedtuple("Swapped", "y x")
Triple = namedtuple("Triple", "index x target")


class Graph:
    """As PyTorch Geometric has it: attributes."""

    def __init__(self, x, y):
        self.x, self.y = x, y


# -- targets


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        ((X, X), Y),
        NamedPair(X, Y),
        Swapped(Y, X),
        Triple(7, X, Y),
        Rows(X, Y),
        Graph(X, Y),
        UserDict(x=X, y=Y),
        (X, Y.tolist()),
        (X, Y.numpy()),
        *({"x": X, key: Y} for key in ("labels", "label", "target", "targets", "y")),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_targets(batch):
    assert torch.equal(BatchReader().targets(batch), Y)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": X, "outcome": Y}, r"a dict with the keys \['outcome', 'x'\]"),
        (Unlabelled(X), r"a Unlabelled with the keys \['image'\]"),
        ((X, X, Y), "a tuple of 3"),
        ([X], "a list of 1"),
        ((), "a tuple of 0"),
        (X, "a Tensor"),
        (None, "a NoneType"),
    ],
)
def test_targets_that_cannot_be_told(batch, found):
    with pytest.raises(
        InputError, match=f"A batch is {found}, so its targets cannot be told: give targets_fn=.*input_ids.*next"
    ):
        BatchReader().targets(batch)


def test_batches_of_three_are_told_both_ways_out_at_once():
    """Whichever is asked for first, and no more than what is not given."""
    targets = "targets_fn=lambda batch: batch[1]"
    inputs = "forward_fn=lambda model, batch: model(batch[0])"
    two_inputs = "forward_fn=lambda model, batch: model(batch[0], batch[1])"
    with pytest.raises(InputError, match=re.escape(f"give {targets} and {inputs}, with the places")):
        BatchReader().targets((X, Y, X))
    with pytest.raises(InputError, match=re.escape(f"give {inputs} and {targets}, with the places")):
        BatchReader().run(module(one), (X, Y, X))
    with pytest.raises(InputError, match=re.escape(f"give {two_inputs} and targets_fn=lambda batch: batch[2], with")):
        BatchReader().run(module(two), (X, X, Y))
    with pytest.raises(InputError, match=re.escape("give targets_fn=lambda batch: batch[...], with their place in")):
        BatchReader(forward_fn=lambda model, batch: None).targets((X, Y, X))
    with pytest.raises(InputError, match=re.escape(f"give {inputs}, with the places")):
        BatchReader(targets_fn=lambda batch: batch[1]).run(module(one), (X, Y, X))


@pytest.mark.parametrize("targets", [None, "text", ["a", "b"], [[0], [1, 2]], {}], ids=str)
def test_targets_that_are_no_tensor(targets):
    with pytest.raises(InputError, match=r"targets of a batch are a .*, not a tensor: give a targets_fn"):
        BatchReader().targets((X, targets))


def test_targets_fn_and_ids_fn():
    reader = BatchReader(targets_fn=lambda batch: batch["outcome"], ids_fn=lambda batch: [5, 6])
    assert torch.equal(reader.targets({"outcome": Y}), Y)
    assert reader.ids(None).tolist() == [5, 6]
    assert BatchReader().ids((X, Y)) is None


@pytest.mark.parametrize("name", ["targets_fn", "forward_fn", "ids_fn"])
@pytest.mark.parametrize("value", [1, "labels", Y])
def test_functions_have_to_be_functions(name, value):
    with pytest.raises(InputError, match=f"{name}=.* is not a function"):
        BatchReader(**{name: value})


# -- inputs


def module(forward, **members):
    """A LightningModule with this `forward`; it returns what it was given."""
    return type("Model", (L.LightningModule,), {"forward": forward, **members})()


def one(self, x):
    return (x,)


def one_optional(self, x, scale=1.0):
    return x, scale


def whole(self, batch):
    return (batch,)


def whole_optional(self, batch, scale=1.0):
    return (batch,)


def two(self, input_ids, attention_mask):
    return input_ids, attention_mask


def hugging_face(self, input_ids=None, pixel_values=None, attention_mask=None, labels=None):
    return input_ids, pixel_values, attention_mask, labels


def by_keyword_only(self, *, image):
    return (image,)


def anything(self, **inputs):
    return (inputs,)


def first_and_anything(self, x, **inputs):
    return x, inputs


def with_targets(self, x, y):
    return x, y


def with_optional_targets(self, x, y=None):
    return x, y


def positional(self, *inputs):
    return inputs


MASK = torch.ones(3)
RUNS = {
    "pair": (one, (X, Y), (X,)),
    "list": (one, [X, Y], (X,)),
    "single": (one, [X], (X,)),
    "tensor": (one, X, (X,)),
    "graph": (one, (graph := Graph(X, Y)), (graph,)),
    "pair, optional": (one_optional, (X, Y), (X, 1.0)),
    "pair, any": (positional, (X, Y), (X,)),
    "pair, whole": (whole, (X, Y), ((X, Y),)),
    "pair, whole, optional": (whole_optional, (X, Y), ((X, Y),)),
    "pair of dict": (one, (inputs := {"a": X, "b": X}, Y), (inputs,)),
    "named pair": (one, NamedPair(X, Y), (X,)),
    "swapped": (one, Swapped(Y, X), (X,)),
    "triple": (one, Triple(7, X, Y), (X,)),
    "triple, whole": (whole, (triple := Triple(7, X, Y)), (triple,)),
    "dataclass": (by_keyword_only, Rows(X, Y), (X,)),
    "dataclass of one": (one, Unlabelled(X), (X,)),
    "dataclass, whole": (one, (rows := Rows(X, Y)), (rows,)),
    "dict": (one, {"x": X, "y": Y}, (X,)),
    "dict, more": (one, {"x": X, "y": Y, "index": 3}, (X,)),
    "dict, other name": (one, {"image": X, "label": Y}, (X,)),
    "dict, other name, any": (positional, {"image": X, "label": Y}, (X,)),
    "dict, other names": (one, (entries := {"a": X, "b": X, "y": Y}), (entries,)),
    "dict, whole": (whole, (entry := {"x": X, "y": Y}), (entry,)),
    "dict, optional": (one_optional, {"x": X, "y": Y}, (X, 1.0)),
    "dict, both": (one_optional, {"x": X, "y": Y, "scale": 3}, (X, 3)),
    "dict, two": (two, {"attention_mask": MASK, "input_ids": X, "labels": Y}, (X, MASK)),
    "dict-like": (two, UserDict(attention_mask=MASK, input_ids=X, labels=Y), (X, MASK)),
    "dict, hugging face": (hugging_face, {"input_ids": X, "attention_mask": MASK, "labels": Y}, (X, None, MASK, None)),
    "dict, hugging face, one": (hugging_face, {"pixel_values": X, "labels": Y}, (None, X, None, None)),
    "dict, hugging face, more": (hugging_face, {"pixel_values": X, "index": 1, "labels": Y}, (None, X, None, None)),
    "dict, anything": (anything, {"a": X, "b": MASK, "labels": Y}, ({"a": X, "b": MASK},)),
    "dict, rest": (first_and_anything, {"x": X, "b": MASK, "labels": Y}, (X, {"b": MASK})),
    "dict, wants targets": (with_targets, {"x": X, "y": Y}, (X, Y)),
    "dict, may have targets": (with_optional_targets, {"x": X, "y": Y}, (X, None)),
}


@pytest.mark.parametrize(("forward", "batch", "expected"), RUNS.values(), ids=RUNS)
def test_inputs(forward, batch, expected):
    reader, model = BatchReader(), module(forward)
    assert reader.returns_outputs(model)
    found = reader.run(model, batch)
    assert len(found) == len(expected)
    assert all(a is b or (not isinstance(b, torch.Tensor) and a == b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (one, (X, X, Y), "a tuple of 3, so the model's inputs cannot be told"),
        (one, [], "a list of 0, so the model's inputs cannot be told"),
        (
            two,
            {"input_ids": X, "labels": Y},
            r"keys \['input_ids', 'labels'\], but Model.forward wants \['input_ids', 'at",
        ),
        (hugging_face, {"a": X, "b": X, "labels": Y}, r"Model.forward wants \['input_ids', 'pixel_values'"),
    ],
)
def test_inputs_that_cannot_be_told(forward, batch, message):
    with pytest.raises(InputError, match=rf"{message}.*give forward_fn=lambda model, batch: model\("):
        BatchReader().run(module(forward), batch)


def test_forward_fn():
    reader = BatchReader(forward_fn=lambda model, batch: model(batch[0] + batch[1]))
    model = module(one)
    assert torch.equal(reader.run(model, (X, X, Y))[0], X + X)
    assert not reader.returns_outputs(model)


def test_a_forward_that_was_put_on_the_instance():
    model = L.LightningModule()
    model.forward = lambda x: x + 1
    reader = BatchReader()
    assert reader.returns_outputs(model)
    assert torch.equal(reader.run(model, (X, Y)), X + 1)


def test_forward_hooks_of_the_model_are_called():
    model, calls = module(one), []
    model.register_forward_hook(lambda *args: calls.append(args))
    BatchReader().run(model, (X, Y))
    assert len(calls) == 1


# -- models without a forward


class Steps(L.LightningModule):
    """Everything that a step may do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.accuracy = MulticlassAccuracy(2)
        self.area = BinaryAUROC()  # list state
        self.seen = CatMetric()
        self.mean = MeanMetric()
        self.range = MinMaxMetric(self.mean)
        self.many = MetricCollection([MulticlassAccuracy(2), MulticlassF1Score(2)])
        self.part = Part()

    def _step(self, batch):
        x, y = batch
        outputs = self.net(x)
        self.accuracy(outputs, y)
        self.area.update(outputs.softmax(1)[:, 1], y)
        self.seen.update(outputs)
        self.range(outputs.mean())
        self.range.compute()
        self.many.update(outputs, y)
        self.part.say(outputs)
        self.log("acc", self.accuracy)
        self.log_dict({"mean": self.mean})
        return outputs


class Part(L.LightningModule):
    """A LightningModule inside another."""

    def __init__(self):
        super().__init__()
        self.total = SumMetric()

    def say(self, outputs):
        self.total.update(outputs)
        self.log("total", self.total)


def full(self, batch, batch_idx, dataloader_idx=0):
    assert (batch_idx, dataloader_idx) == (0, 0)
    return self._step(batch)


def required(self, batch, batch_idx, dataloader_idx):
    assert (batch_idx, dataloader_idx) == (0, 0)
    return self._step(batch)


def other_option(self, batch, batch_idx, prefix="val"):
    assert (batch_idx, prefix) == (0, "val")
    return self._step(batch)


def only_batch(self, batch):
    return self._step(batch)


def starred(self, *args):
    batch, batch_idx = args
    assert batch_idx == 0
    return self._step(batch)


@pytest.mark.parametrize("name", ["predict_step", "validation_step", "test_step"])
@pytest.mark.parametrize("step", [full, required, other_option, only_batch, starred])
def test_models_without_forward_are_run_through_a_step(name, step):
    model = type("Model", (Steps,), {name: step})()
    reader = BatchReader()
    assert not reader.returns_outputs(model)
    with reader.quiet(model):
        assert torch.equal(reader.run(model, (X, Y)), model.net(X))


def test_steps_are_tried_in_order():
    def named(name):
        return lambda self, batch: name

    steps = ("test_step", "validation_step", "predict_step")
    members = {}
    for name in steps:
        members[name] = named(name)
        assert BatchReader().run(type("Model", (L.LightningModule,), members)(), (X, Y)) == name


def test_a_model_without_anything_to_run():
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.loss, self.network = torch.nn.CrossEntropyLoss(), torch.nn.Linear(1, 1)

        def training_step(self, batch):
            return None

    with pytest.raises(InputError, match=r"Model has no forward, predict_step.*give forward_fn=.*model\.network\("):
        BatchReader().run(Model(), (X, Y))


class Validated(Steps):
    def validation_step(self, batch, batch_idx):
        return self._step(batch)


class Forwarded(Steps):
    def forward(self, batch):
        return self._step(batch)


def states(model):
    found = {}
    for name, metric in model.named_modules():
        if hasattr(metric, "_defaults"):
            found[name] = ({state: getattr(metric, state) for state in metric._defaults}, metric._update_count)
    found["range.min_val"], found["range.max_val"] = model.range.min_val, model.range.max_val
    return repr(found)


def results(model):
    values = [model.accuracy.compute(), model.area.compute(), model.seen.compute(), model.mean.compute()]
    values += [*model.range.compute().values(), *model.many.compute().values(), model.part.total.compute()]
    return [value.tolist() for value in values]


def silent(model):
    vars(model).update(log=lambda *args: None, log_dict=lambda *args: None)
    vars(model.part).update(log=lambda *args: None)
    return model


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_metrics_go_on_as_if_nothing_had_happened(before, after):
    """The same updates with and without a quiet run in between give the same results."""
    found = []
    for quiet_runs in (0, 2):
        torch.manual_seed(0)
        model, reader = Validated(), BatchReader()
        for step in range(before + after):
            if step == before:
                now = states(model)
                for _ in range(quiet_runs):
                    with reader.quiet(model):
                        reader.run(model, (torch.randn(3, 2) * 9, Y.flip(0)))
                assert states(model) == now
            Steps._step(silent(model), (X + step - 1, Y))
            del model.log, model.log_dict, model.part.log
        found.append(results(model))
    assert found[0] == found[1]


def test_computed_values_are_kept():
    model, reader = Validated(), BatchReader()
    model.accuracy.update(torch.eye(2), torch.tensor([0, 1]))
    assert model.accuracy.compute() == 1
    with reader.quiet(model):
        reader.run(model, (X, Y))
    assert model.accuracy._computed == 1
    assert model.accuracy.compute() == 1


class Failing(Validated):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        raise ValueError("stop")


def test_after_an_exception_all_is_as_before():
    model, reader = Failing(), BatchReader()
    before = states(model)
    with pytest.raises(ValueError, match="stop"), reader.quiet(model):
        reader.run(model, (X, Y))
    assert states(model) == before
    for part in (model, model.part):
        assert "log" not in vars(part)
        assert "log_dict" not in vars(part)


def test_a_forward_fn_that_runs_a_step_is_quiet_too():
    model = Forwarded()
    reader = BatchReader(forward_fn=lambda model, batch: model(batch))
    before = states(model)
    with reader.quiet(model):
        assert torch.equal(reader.run(model, (X, Y)), model.net(X))
    assert states(model) == before


# -- transfer hooks


class Doubling(L.LightningDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch * 2


class Adding(L.LightningModule):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch + 1

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch + 100


def test_transfer_hooks_are_borrowed_from_the_first_that_has_them():
    module = L.LightningModule()
    borrow_transfer_hooks(module, [Doubling(), Adding()])
    assert module.on_before_batch_transfer(1, 0) == 2
    assert module.on_after_batch_transfer(1, 0) == 2
    assert "transfer_batch_to_device" not in vars(module)
    assert np.array_equal(module.transfer_batch_to_device(torch.ones(1), torch.device("cpu"), 0), [1])


# -- hints


class Silent(Steps):
    """No forward, and a validation step that runs nothing."""

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("head", [None, "net"])
def test_a_step_that_does_not_run_the_network_is_named_first(head):
    model, reader = Silent(), BatchReader()
    expected = r"^Silent has no forward, so a batch was run through its validation_step\. .*give forward_fn="

    def ask():
        if head is None:
            return HeadTap.find(model, lambda: reader.run(model, (X, Y)), returns_outputs=False)
        tap = HeadTap(model, head)
        with tap.capture():
            reader.run(model, (X, Y))
            return tap.take()

    with pytest.raises(HeadError, match=expected), reader.quiet(model):
        ask()


def test_a_forward_that_wants_the_whole_batch_is_named_first():
    def unpacks(self, data):
        x, _ = data
        return self.net(x)

    model = type("Model", (Steps,), {"forward": unpacks})()
    pair = torch.randn(2, 2), Y[:2]
    expected = (
        r"^ResMem called Model\(Tensor of shape \(2, 2\)\) .* whole batch, .*forward_fn=lambda model, batch: model\(b"
    )
    with pytest.raises(InputError, match=expected), HeadTap(model, "net").capture():
        BatchReader().run(model, pair)
    reader = BatchReader(forward_fn=lambda model, batch: model(batch))
    assert torch.equal(reader.run(model, pair), model.net(pair[0]))


# -- lists of rows


LISTS = {
    "pairs": [(X[0], 0), (X[1], 1), (X[2], 0)],
    "two pairs": [(X[0], Y[0]), (X[1], Y[1])],
    "dicts": [{"x": X[0], "label": 0}, {"x": X[1], "label": 1}],
}


@pytest.mark.parametrize("rows", LISTS.values(), ids=LISTS)
def test_a_list_of_rows_becomes_a_batch(rows):
    reader = BatchReader()
    batch = reader.collate(rows, {()})
    assert torch.equal(reader.targets(batch), Y[: len(rows)])
    inputs = batch["x"] if isinstance(batch, dict) else batch[0]
    assert torch.equal(inputs, X[: len(rows)])
    assert reader.collate(batch, {()}) is batch


@pytest.mark.parametrize(
    "batch",
    [[X, Y], (X, Y), X, [], [X], {"x": X, "y": Y}, [(X, X), (Y, Y)], [{"x": X, "y": Y}], [(X[0],), (X[1],)]],
    ids=str,
)
def test_batches_stay_as_they_are(batch):
    assert BatchReader().collate(batch, {()}) is batch


def test_rows_with_several_numbers_for_a_target():
    rows = [(X[0], X[0]), (X[1], X[1])]
    assert BatchReader().collate(rows, {()}) is rows
    assert torch.equal(BatchReader().collate(rows, {(2,)})[1], X[:2])
    triples = [(7, X[0], 0), (8, X[1], 1)]
    reader = BatchReader(targets_fn=lambda batch: batch[2])
    assert torch.equal(reader.targets(reader.collate(triples, {()})), Y[:2])
