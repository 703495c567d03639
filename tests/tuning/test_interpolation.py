"""A base that fits its training rows perfectly leaves nothing to memorize: noticed, and said."""

import pytest
import torch

from lightning_resmem import GridTuner, LocalMemory
from lightning_resmem.errors import ResMemWarning
from lightning_resmem.tasks import Multiclass, Multilabel, Regression
from lightning_resmem.tuning.interpolation import measure_residuals
from lightning_resmem.tuning.rows import Rows


def rows(task, stored_sureness, unseen_sureness):
    """A base that has every label right, as sure as given, on the rows of the memory and on others."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(120, 3, generator=generator)
    memory = LocalMemory(task=task)
    if isinstance(task, Multiclass):
        targets = torch.arange(120) % 4
        signs = torch.eye(4)[targets]
    else:
        targets = torch.randint(0, 2, (120, 4), generator=generator).float()
        signs = 2 * targets - 1
    unseen = Rows(keys + 0.1, unseen_sureness * signs, targets, None)
    memory.add(keys, stored_sureness * signs, targets)
    if isinstance(task, Regression):
        memory.update(torch.arange(120), outputs=targets + 1 / stored_sureness)
        unseen = unseen._replace(outputs=targets + 1 / unseen_sureness)
    return memory, unseen


@pytest.mark.parametrize("task", [Multiclass(), Multilabel(), Regression()], ids=lambda task: task.name)
def test_residuals_vanish_only_if_those_of_unseen_rows_do_not(task):
    for stored, unseen, vanish in ((200.0, 0.5, True), (200.0, 200.0, False), (0.5, 0.5, False)):
        memory, others = rows(task, stored, unseen)
        found = measure_residuals(memory, others, gather=lambda part: part)
        assert found.vanish is vanish, found
        itself = measure_residuals(memory, others._replace(ids=memory.ids), gather=lambda part: part)
        assert itself.unseen is None
        assert itself.vanish is (stored == 200.0)


def test_labels_that_are_all_the_same_say_nothing():
    memory = LocalMemory(task=Regression())
    memory.add(torch.randn(20, 2), torch.ones(20, 1), torch.ones(20, 1))
    assert not measure_residuals(
        memory, Rows(torch.zeros(1, 2), torch.zeros(1, 1), torch.zeros(1, 1), None), list
    ).vanish


def test_the_tuner_offers_a_memory_of_other_rows():
    memory, unseen = rows(Multiclass(), 200.0, 0.5)
    with pytest.warns(
        ResMemWarning, match=r"fits the rows of its memory almost perfectly \(residuals of 0.0%, \d+.\d% on"
    ):
        GridTuner(k=[5]).tune(memory, *unseen[:3])
    with pytest.warns(ResMemWarning, match=r"say nothing about the memory.*memory_dataloader") as caught:
        result = GridTuner(k=[5]).tune_leave_one_out(memory)
    assert len(caught) == 1
    assert result.params.strength == 0
