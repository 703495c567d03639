"""Tuning on rows of the memory: none of them is its own neighbour."""

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.errors import InputError
from lightning_resmem.tuning.tuner import GridTuner
from tests import oracle
from tests.tuning.validation import AXES, GRID, TASK_NAMES, filled, rows, scores

# They choose on few rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_leave_one_out_is_a_memory_without_the_row(task):
    memory = filled(task, count=40)
    embeddings, outputs, targets = rows(40, task, seed=1)
    result = GridTuner(**GRID).tune_leave_one_out(memory)
    assert result.leave_one_out
    assert result.rows == 40
    assert "on 40 rows of the memory, each left out of it" in result.summary()
    for setting in result.table:
        params = {name: setting[name] for name in AXES}
        found = []
        for row in range(40):
            others = torch.arange(40) != row
            query = embeddings[row : row + 1], outputs[row : row + 1]
            combined = oracle.predict(embeddings[others], outputs[others], targets[others], *query, task=task, **params)
            found.append(scores(combined.resmem, combined.base, targets[row : row + 1], task)[0])
        assert setting["score"] == pytest.approx(np.mean(found), abs=1e-5)


def test_leave_one_out_draws_rows_and_does_so_again():
    memory = filled(count=100)
    result = GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=1)
    assert result.rows == 60
    assert GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=1) == result
    assert GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=2) != result


def test_a_row_that_does_not_find_itself_loses_its_farthest_neighbour():
    """Of many equal rows the search may return others."""
    memory = LocalMemory()
    memory.add(torch.zeros(60, 2), torch.zeros(60, 2), torch.arange(60) % 2)
    result = GridTuner(k=[1, 2], refinements=0).tune_leave_one_out(memory)
    assert {setting["k"] for setting in result.table} == {1, 2}


def test_leave_one_out_takes_two_rows():
    memory = LocalMemory()
    memory.add(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(InputError, match="has 1 rows: leaving one out takes at least two"):
        GridTuner().tune_leave_one_out(memory)
    with pytest.raises(InputError, match="rows=0"):
        GridTuner().tune_leave_one_out(filled(), rows=0)
