"""Targets that cannot be: where validation and failing steps show them, and what is kept when only tuning does."""

import warnings

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_resmem import GridTuner, InputError, LocalMemory, ResMemCallback, ResMemWarning, Tuner
from tests.models import CallsSelf, Data, make, rows, trainer

TUNER = GridTuner(k=[3], sigma=[0.4], softmax_temperature=[1.0], strength=[1.0], refinements=0, calibrate=False)


class Scores(CallsSelf):
    """Its validation does not mind labels that are no class."""

    def validation_step(self, batch, batch_idx):
        self(batch[0])


def labelled(part, *places):
    inputs, labels = part
    labels = labels.clone()
    labels[list(places)] = 9
    return DataLoader(TensorDataset(inputs, labels), batch_size=16)


@pytest.mark.parametrize(("row", "said", "steps"), [(30, "batch 1 .* rows 14,", 0), (39, "batch 2 .* rows 7,", 4)])
def test_a_validation_label_is_refused_when_it_is_first_seen(row, said, steps, tmp_path):
    run = trainer(tmp_path, ResMemCallback(), limit_train_batches=4, num_sanity_val_steps=2)
    with pytest.raises(InputError, match=rf"^In {said} outside \[0, 4\).*ignore_index=9") as caught:
        run.fit(make(Scores), DataLoader(TensorDataset(*rows(120, 1)), batch_size=16), labelled(rows(40, 2), row))
    assert "of the validation rows: targets holds 9" in str(caught.value)
    assert run.global_step == steps


def test_validation_labels_do_not_matter_without_a_tuner_or_where_a_loss_ignores_them(tmp_path):
    class Ignores(Scores):
        def __init__(self):
            super().__init__()
            self.loss_function = nn.CrossEntropyLoss(ignore_index=9)

    for kind, tuner in ((Scores, None), (Ignores, TUNER)):
        resmem = ResMemCallback(tuner=tuner)
        run = trainer(tmp_path, resmem)
        run.fit(make(kind), DataLoader(TensorDataset(*rows(120, 1)), batch_size=16), labelled(rows(40, 2), 20, 39))
        assert len(resmem.memory) == 120


class OnlyTrains(CallsSelf):
    validation_step = L.LightningModule.validation_step


class Fails(Tuner):
    def tune(self, *args, **kwargs):
        raise KeyError("ours")


@pytest.mark.parametrize("embedding", [None, "auto"])
def test_what_fails_in_tuning_leaves_the_memory_that_was_filled(embedding, tmp_path):
    data, model = Data(), make(Scores)
    bad = labelled(data.val, 39), InputError, "the validation rows of .*9 in rows 39"
    for tuner, (val, kind, said) in ((TUNER, bad), (Fails(), (labelled(data.val), KeyError, "ours"))):
        resmem = ResMemCallback(tuner=tuner, dirpath=tmp_path / kind.__name__, embedding=embedding)
        # No validation comes before it, so that tuning is the first to see the label.
        run = trainer(tmp_path, resmem, num_sanity_val_steps=0, check_val_every_n_epoch=2)
        with pytest.raises(kind, match=said) as caught:
            run.fit(model, data.train_dataloader(), val)
        assert "the memory has all its rows, and params that are measured, not tuned" in caught.value.__notes__[0]
        assert len(caught.value.__notes__) == 1
        assert resmem.tuning is None
        saved = LocalMemory.load(tmp_path / kind.__name__)
        assert len(saved) == len(resmem.memory) == 120
        assert saved.params == resmem.memory.params
        assert saved.stats()["width"] == 5
        assert resmem.module.predictions(data.test).resmem.shape == (50, 4)


def test_a_step_that_fails_on_a_label_names_it(tmp_path):
    run = trainer(tmp_path, resmem := ResMemCallback())
    with pytest.raises(IndexError) as caught:
        run.fit(make(CallsSelf), labelled(rows(120, 1), 87))
    assert caught.value.__notes__[0].startswith(
        "In the batch of this training step: targets holds 9 in rows 7, outside"
    )
    others = DataLoader(TensorDataset(*rows(20, 1)), batch_size=9)  # what the labels of the others are is not known
    run = trainer(tmp_path, ResMemCallback(memory_dataloader=others))
    with pytest.raises(IndexError) as caught:
        run.fit(make(CallsSelf), labelled(rows(120, 1), 87))
    assert not hasattr(caught.value, "__notes__")
    assert len(resmem.memory) == 0


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*rows(60, 1), strict=True)


class MapsLabels(OnlyTrains):
    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, 3 - targets)


def test_the_first_step_is_looked_at_where_no_row_could_be_read_before(tmp_path):
    with pytest.raises(InputError, match="trained on other labels than those of the batch"):
        trainer(tmp_path, ResMemCallback(head="head")).fit(make(MapsLabels), DataLoader(Stream(), batch_size=20))


@pytest.mark.parametrize("kind", ["no step", "no rows"])
def test_validation_rows_that_nothing_is_tuned_on_are_told(kind, tmp_path):
    data, model = Data(), make(OnlyTrains if kind == "no step" else CallsSelf)
    val = labelled(data.val) if kind == "no step" else labelled((torch.zeros(0, 4), torch.zeros(0).long()))
    said = {
        "no step": "has no validation_step, so the Trainer reads no validation rows",
        "no rows": "has no rows, so there",
    }
    for tuner in (TUNER, None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, ResMemCallback(tuner=tuner)).fit(model, data.train_dataloader(), val)
        ours = [
            str(w.message) for w in caught if issubclass(w.category, ResMemWarning) and said[kind] in str(w.message)
        ]
        assert len(ours) == (tuner is not None)
