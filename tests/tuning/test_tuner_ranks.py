"""Several ranks choose what one process chooses, and all of them the same."""

import threading

import pytest
import torch

from lightning_resmem import LocalMemory, Regression
from lightning_resmem.errors import InputError
from lightning_resmem.tuning.tuner import GridTuner
from tests.tuning.validation import GRID, TASK_NAMES, filled, rows

# They choose on few rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")


class Together:
    """Threads that stand for ranks: `gather` waits for all of them, as a collective does."""

    def __init__(self, size):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=30)

    def gather(self, rank):
        def concatenate(tensor):
            self.slots[rank] = tensor
            self.barrier.wait()
            gathered = torch.cat(self.slots)
            self.barrier.wait()
            return gathered

        return concatenate


def tuned_on_ranks(tuner, memories, parts, groups=None):
    together, results = Together(len(parts)), [None] * len(parts)

    def work(rank):
        try:
            options = {} if groups is None else {"groups": groups[rank]}
            results[rank] = tuner.tune(memories[rank], *parts[rank], gather=together.gather(rank), **options)
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, InputError):  # which all of them raise, and some may still be leaving the barrier
                together.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("sizes", [(13, 12), (1, 20, 4), (10, 0, 15), (0, 25)], ids=str)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_ranks_choose_what_one_process_chooses(task, sizes):
    memory, validation = filled(task), rows(25, task, seed=2)
    parts = list(zip(*(tensor.split(sizes) for tensor in validation), strict=True))
    for objective in ("accuracy", "nll"):
        tuner = GridTuner(**GRID, objective=objective)
        alone = tuner.tune(memory, *validation)
        found = tuned_on_ranks(tuner, [memory] * len(parts), parts)
        assert all(result == found[0] for result in found), found
        params = found[0].params
        assert (params.k, params.softmax_temperature, params.strength) == (
            alone.params.k,
            alone.params.softmax_temperature,
            alone.params.strength,
        )
        assert params.sigma == pytest.approx(alone.params.sigma, rel=1e-6)
        assert found[0].rows == 25
        assert found[0].gain_error == pytest.approx(alone.gain_error, rel=1e-4, abs=1e-6)
        for setting, expected in zip(found[0].table, alone.table, strict=True):
            assert setting == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("sizes", [(13, 12), (25, 0)], ids=str)
def test_ranks_know_each_others_times(sizes):
    memory, validation = LocalMemory(task=Regression()), rows(25, "regression", seed=2)
    memory.add(*rows(40, "regression", seed=1), times=torch.arange(40)[:, None].expand(-1, 2))
    asked_at = torch.arange(25) // 5 * 10
    tuner = GridTuner(**{**GRID, "noise": 1})
    alone = tuner.tune(memory.at(asked_at), *validation)
    views = [memory.at(part) for part in asked_at.split(sizes)]
    found = tuned_on_ranks(tuner, views, list(zip(*(tensor.split(sizes) for tensor in validation), strict=True)))
    assert found[0] == found[1]
    assert found[0].params == alone.params
    assert found[0].gain_error == pytest.approx(alone.gain_error)
    assert alone.gain_error > 0


def test_no_validation_rows_on_any_rank():
    empty = rows(0, "multiclass", seed=2)
    assert all(isinstance(result, InputError) for result in tuned_on_ranks(GridTuner(), [filled()] * 2, [empty] * 2))


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
@pytest.mark.parametrize("gate", [False, True])
def test_ranks_leave_out_the_same_rows_and_agree_with_one_process(objective, gate):
    memory, tuner = filled(count=90), GridTuner(**{**GRID, "noise": 1}, objective=objective, gate=gate)
    alone = tuner.tune_leave_one_out(memory, rows=70)
    together, found = Together(3), [None] * 3

    def work(rank):
        found[rank] = tuner.tune_leave_one_out(memory, 70, 0, together.gather(rank), rank, 3)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert found[0].params == alone.params
    assert found[0].score == pytest.approx(alone.score)
    for setting, expected in zip(found[0].table, alone.table, strict=True):
        assert setting == pytest.approx(expected, rel=1e-5, abs=1e-6)
