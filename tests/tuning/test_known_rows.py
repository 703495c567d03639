"""Validation rows that are rows of the memory are told of; rows that are only alike are not."""

import warnings

import pytest
import torch

from lightning_resmem import LocalMemory, ResMemCallback
from lightning_resmem.tuning.tuner import GridTuner
from tests.models import CallsSelf, Data, make, trainer
from tests.tuning.validation import TASK_NAMES, filled, rows


def told(memory, embeddings, outputs, targets):
    """How many rows the warning counts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GridTuner(k=[1, 5], sigma=[0.2], strength=[1.0]).tune(memory, embeddings, outputs, targets)
    said = [str(warning.message) for warning in caught if "are rows of the memory" in str(warning.message)]
    return int(said[0].split(" validation rows are rows")[0].split(". ")[-1].split()[0]) if said else 0


@pytest.mark.parametrize("task", TASK_NAMES)
def test_rows_of_the_memory_among_the_validation_rows(task):
    memory = filled(task, count=200)
    known, new = rows(200, task, seed=1), rows(100, task, seed=2)
    for count, expected in ((0, 0), (5, 0), (6, 6), (30, 30)):
        mixed = [torch.cat([part[:count], other]) for part, other in zip(known, new, strict=True)]
        mixed[0] = mixed[0] * (1 + 1e-7)  # as another batch would compute them
        assert told(memory, *mixed) == expected


def test_a_few_of_many_are_no_reason():
    memory, known, new = filled(count=200), rows(200, "multiclass", 1), rows(2000, "multiclass", 2)
    assert told(memory, *(torch.cat([part[:15], other]) for part, other in zip(known, new, strict=True))) == 0


def test_other_labels_and_rows_that_are_alike_do_not_count():
    memory, (embeddings, outputs, targets) = filled(count=200), rows(200, "multiclass", 1)
    assert told(memory, embeddings, outputs, (targets + 1) % 3) == 0
    collapsed = LocalMemory()  # all embeddings are one of three
    collapsed.add(torch.eye(3).repeat(20, 1), torch.zeros(60, 3), torch.arange(3).repeat(20))
    assert told(collapsed, torch.eye(3).repeat(20, 1), torch.zeros(60, 3), torch.arange(3).repeat(20)) == 0


def test_of_sequences_those_count_that_are_known_for_the_most_part():
    """The first tokens of many are known, as they begin alike; windows that overlap share most."""
    memory, (keys, outputs, targets) = filled(count=200), rows(200, "multiclass", 1)
    memory.provenance["stride"] = str(2**20)
    new, sequences = rows(200, "multiclass", 2), torch.arange(200) // 10

    def tune(known):
        parts = zip((keys, outputs, targets), new, strict=True)
        mixed = [torch.where(known.reshape(-1, *[1] * (old.ndim - 1)), old, other) for old, other in parts]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            GridTuner(k=[1, 5], sigma=[0.2], strength=[1.0]).tune(memory, *mixed, groups=sequences)
        return " ".join(str(warning.message) for warning in caught)

    assert "overlap" not in tune(torch.arange(200) % 10 < 3)
    said = tune(torch.arange(200) % 10 < torch.where(sequences < 4, 7, 2))
    assert "28 of the 200 validation tokens are in sequences that the memory holds, or whose windows overlap" in said


def test_in_fit(tmp_path):
    data = Data()
    with pytest.warns(UserWarning, match="60 of the 60 validation rows are rows of the memory"):
        trainer(tmp_path, ResMemCallback()).fit(
            make(CallsSelf), data.train_dataloader(), data.loader(tuple(part[:60] for part in data.train))
        )
