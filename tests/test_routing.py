"""What a run shows for steps that call the head in unusual ways."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAUROC

from lightning_resmem import (
    HeadError,
    LocalMemory,
    ResMemCallback,
    ResMemError,
    ResMemParams,
    ResMemWarning,
    StaleMemoryError,
)
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.tasks import TASKS
from tests.models import CallsSelf, Data, ManyLabels, Numbers, Trained, data_for, hooks_on, make, memory_for, trainer


def fitted(kind, root, **options):
    data, model, callback = data_for(kind), make(kind), ResMemCallback(memory_for(kind), **options)
    run = trainer(root, callback)
    run.fit(model, datamodule=data)
    return run, model, data, Trained(model).scores(data.train, data.test, callback.memory.params)


def check(logged, wanted, name="acc"):
    assert {part: logged[f"test/{name}_{part}"] for part in wanted} == pytest.approx(wanted, rel=1e-4)


class Twice(CallsSelf):
    """Averages over two views of a batch."""

    def outputs(self, batch):
        return (self(batch[0]).softmax(1) + self(batch[0]).softmax(1)).log()


class Halves(CallsSelf):
    """Runs a batch in two parts."""

    def outputs(self, batch):
        return torch.cat([self(part) for part in batch[0].split(7)])


class InPlace(CallsSelf):
    """Changes what the head returned, and what it was given."""

    def outputs(self, batch):
        hidden = self.body(batch[0])
        outputs = self.head(hidden)
        if not self.training:
            hidden.zero_()
        outputs -= 5
        return outputs


class ByKeyword(CallsSelf):
    def outputs(self, batch):
        return self.head(input=self.body(batch[0]))


@pytest.mark.parametrize("kind", [Twice, Halves, InPlace, ByKeyword], ids=lambda kind: kind.__name__)
def test_unusual_steps(kind, tmp_path):
    run, model, data, wanted = fitted(kind, tmp_path, forward_fn=lambda model, batch: model(batch[0]))
    (logged,) = run.test(model, datamodule=data, verbose=False)
    check(logged, wanted)
    assert logged["test_score"] == pytest.approx(wanted["resmem"])


class Rescales(Numbers):
    """Brings predictions back to their unit in place."""

    def evaluate(self, batch, stage):
        outputs = self(batch[0])
        outputs *= 10
        self.log(f"{stage}_score", F.mse_loss(outputs, batch[1] * 10), batch_size=len(batch[1]))


@pytest.mark.parametrize("route", [True, False])
def test_predictions_that_are_changed_in_place_are_scored_as_they_were(route, tmp_path):
    run, model, data, wanted = fitted(Rescales, tmp_path, route=route)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    check(logged, wanted, "mse")
    assert logged["test_score"] == pytest.approx(100 * wanted["resmem" if route else "base"], rel=1e-4)


def test_what_a_run_showed(tmp_path):
    """The user's own metrics, and everything that is not shown at a glance."""
    auroc = MulticlassAUROC(4)
    run, model, data, _ = fitted(CallsSelf, tmp_path, metrics={"auroc": auroc})
    callback = run.callbacks[-1]
    with pytest.raises(ResMemError, match=r"evaluation is there after trainer\.test"):
        _ = callback.evaluation
    (logged,) = run.test(model, datamodule=data, verbose=False)
    seen = callback.evaluation
    assert seen.rows == 50
    assert seen.shown_scores() == pytest.approx({name: logged[name] for name in logged if "/" in name})
    assert logged["test/nll_resmem"] == pytest.approx(logged["test_loss"], rel=1e-5)
    predicted = torch.cat(run.predict(model, datamodule=data)).softmax(dim=1)
    assert callback.evaluation is seen
    assert logged["test/auroc_resmem"] == pytest.approx(auroc(predicted, data.test[1]).item(), abs=1e-4)
    alone = trainer(tmp_path).predict(model, datamodule=data)
    turned = predicted.argmax(dim=1) != torch.cat(alone).argmax(dim=1)
    for flip in seen.flips:
        assert turned[flip.position]
        assert data.test[1][flip.position] == flip.target
    either = sum((seen.scores["positive_flip_rate"], seen.scores["negative_flip_rate"]))
    assert len(seen.flips) == round(50 * either) > 0
    run.validate(model, datamodule=data, verbose=False)
    assert (callback.evaluation.prefix, callback.evaluation.rows) == ("val", 40)
    (again,) = trainer(tmp_path).test(callback.module, datamodule=data, verbose=False)
    assert again == pytest.approx(seen.shown_scores())


class MoreRows(CallsSelf):
    """Asks for rows that have no targets."""

    def outputs(self, batch):
        return self(torch.cat([batch[0], batch[0][:3]]))[: len(batch[0])]


def test_rows_without_targets_are_not_scored(tmp_path):
    run, model, data, wanted = fitted(MoreRows, tmp_path)
    with pytest.warns(ResMemWarning, match="other rows than the batch's 16 targets"):
        (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged["test_score"] == pytest.approx(wanted["resmem"])
    assert not [name for name in logged if name.startswith("test/")]


class Labelled(CallsSelf):
    """Drops the rows without a label before the network sees them."""

    def test_step(self, batch, batch_idx):
        kept = batch[1] != -100
        super().test_step((batch[0][kept], batch[1][kept]), batch_idx)


def test_rows_that_a_step_drops_for_their_label_are_not_scored(tmp_path):
    run, model, data, _ = fitted(Labelled, tmp_path)
    data.test[1][[0, 1, 20, 49]] = -100
    (logged,) = run.test(model, datamodule=data, verbose=False)
    seen = run.callbacks[-1].evaluation
    assert (seen.rows, seen.ignored) == (46, 4)
    (wanted,) = run.test(make_plain(model), datamodule=data, verbose=False)
    assert {name: value for name, value in logged.items() if "/" in name} == pytest.approx(
        {name: value for name, value in wanted.items() if "/" in name}
    )
    flips = [(flip.position, flip.resmem) for flip in seen.flips]
    assert flips == [(flip.position, flip.resmem) for flip in run.callbacks[-1].evaluation.flips]
    assert len(flips) > 1


def make_plain(model):
    """The same weights, with steps that drop nothing."""
    plain = CallsSelf()
    plain.load_state_dict(model.state_dict())
    return plain


def test_route_off_scores_beside_the_base(tmp_path):
    run, model, data, wanted = fitted(CallsSelf, tmp_path, route=False)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    check(logged, wanted)
    assert logged["test_score"] == pytest.approx(wanted["base"])
    outputs = torch.cat(run.predict(model, datamodule=data))
    assert torch.equal(outputs, torch.cat(trainer(tmp_path).predict(model, datamodule=data)))


def test_a_test_set_without_labels_is_not_scored(tmp_path):
    run, model, data, _ = fitted(CallsSelf, tmp_path)
    data.test = (data.test[0], torch.full_like(data.test[1], -1))
    model.loss = lambda outputs, targets: outputs.exp().sum(dim=1).mean()
    with pytest.warns(ResMemWarning, match=r"outside \[0, 4\)"):
        (logged,) = run.test(model, datamodule=data, verbose=False)
    assert logged == {"test_score": 0.0, "test_loss": pytest.approx(1.0)}, "log-probabilities, so it was routed"
    assert hooks_on(model) == 0


class Compiled(CallsSelf):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(torch.nn.Sequential(self.body, self.head), backend="eager")

    def forward(self, x):
        return self.net(x)


def test_a_compiled_network(tmp_path):
    run, model, data, wanted = fitted(Compiled, tmp_path)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    check(logged, wanted)
    assert logged["test_score"] == pytest.approx(wanted["resmem"])
    assert trainer(tmp_path).test(model, datamodule=data, verbose=False)[0]["test_score"] == pytest.approx(
        wanted["base"]
    )


class Convolution(CallsSelf):
    """A spatial network: keys are pooled from a layer in the middle."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.head = torch.nn.Linear(6 * 4, 4)

    def forward(self, x):
        return self.head(self.conv(x.reshape(-1, 1, 2, 2)).relu().flatten(1))


def test_keys_from_a_spatial_layer(tmp_path):
    data, model = Data(), make(Convolution)
    callback = ResMemCallback(LocalMemory(params=ResMemParams(k=1, sigma=1.0)), embedding="conv")
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    keys = model.conv(data.train[0].reshape(-1, 1, 2, 2)).mean(dim=(2, 3)).detach()
    assert torch.allclose(callback.memory.search(keys, 1).distances, torch.zeros(120, 1), atol=1e-5)
    (logged,) = run.test(model, data.loader(data.train), verbose=False)
    assert logged["test_score"] == logged["test/acc_resmem"] == 1.0, "k=1 memorizes the training rows"


def test_a_run_ends_early(tmp_path):
    run, model, data, _ = fitted(CallsSelf, tmp_path)
    early = trainer(tmp_path, *run.callbacks, limit_test_batches=2)
    (logged,) = early.test(model, datamodule=data, verbose=False)
    part = (data.test[0][:32], data.test[1][:32])
    check(logged, Trained(model).scores(data.train, part, run.callbacks[-1].memory.params))
    trainer(tmp_path, *run.callbacks, limit_test_batches=0).test(model, datamodule=data, verbose=False)
    assert hooks_on(model) == 0


class HeadInABranch(CallsSelf):
    """Its second batch does not reach the head."""

    def test_step(self, batch, batch_idx):
        return self(batch[0]) if batch_idx == 0 else None


def test_a_batch_that_misses_the_head(tmp_path):
    run, model, data, _ = fitted(HeadInABranch, tmp_path)
    with pytest.raises(HeadError, match="'head' was not called"):
        run.test(model, datamodule=data, verbose=False)
    assert hooks_on(model) == 0


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_confident_rows_stay_finite(task, tmp_path):
    # k=1 on the training rows: F is one-hot, its logarithm must not be.
    kind = {"multiclass": CallsSelf, "multilabel": ManyLabels}[task]
    data, model = data_for(kind), make(kind)
    callback = ResMemCallback(LocalMemory(TASKS[task](), ResMemParams(k=1, sigma=1.0)))
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    (logged,) = run.test(model, data.loader(data.train), verbose=False)
    assert logged["test_score"] == 1.0
    assert np.isfinite(logged["test_loss"])
    assert logged["test_loss"] < 0.2


class ShakenMeanwhile(CallsSelf):
    """Whose weights change within a test run."""

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        with torch.no_grad():
            self.head.weight += 0.1


class CountsTests(CallsSelf):
    """Which counts its test steps in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tested", torch.tensor(0))

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.tested += 1


def test_weights_that_change_within_a_run(tmp_path):
    run, model, data, _ = fitted(ShakenMeanwhile, tmp_path)
    with pytest.raises(StaleMemoryError, match="The run goes on with weights"):
        run.test(model, datamodule=data, verbose=False)
    assert not hooks_on(model)
    run, model, data, wanted = fitted(CountsTests, tmp_path)
    (logged,) = run.test(model, datamodule=data, verbose=False)
    check(logged, wanted)


def test_a_memory_that_is_filled_again_within_a_run(tmp_path):
    run, model, data, _ = fitted(CallsSelf, tmp_path)
    callback = next(callback for callback in run.callbacks if isinstance(callback, ResMemCallback))
    memory = callback.memory
    rows, width = memory.stored(memory.places(memory.ids)), memory.num_outputs

    def refill(*_):
        memory.clear()
        memory.add_stored(rows, width)

    model.on_test_batch_end = refill
    with pytest.raises(StaleMemoryError, match="was cleared since"):
        run.test(model, datamodule=data, verbose=False)


@pytest.mark.parametrize("index", ["exact", FaissIndex("IVF4,Flat", nprobe=4)])
def test_a_callback_that_has_answered_can_be_copied(index, tmp_path):
    data, model, callback = data_for(CallsSelf), make(CallsSelf), ResMemCallback(LocalMemory(index=index), tuner=None)
    run = trainer(tmp_path, callback)
    run.fit(model, datamodule=data)
    (wanted,) = run.test(model, datamodule=data, verbose=False)
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        (logged,) = trainer(tmp_path, copied).test(model, datamodule=data, verbose=False)
        assert logged == pytest.approx(wanted)
