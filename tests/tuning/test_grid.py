"""Beyond the grid: refined around its best setting, and what a bound or noise leaves of the choice."""

import pytest
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.errors import ResMemWarning
from lightning_resmem.tuning.tuner import GridTuner
from tests.tuning.validation import GRID, filled, right, rows

# They choose on few rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")


def test_the_grid_is_refined_around_its_best_setting():
    memory, validation = filled(count=200), rows(100, "multiclass", seed=2)
    grid = {**GRID, "k": [3, 12, 48], "noise": 0, "sigma": [0.3]}
    coarse = GridTuner(**grid).tune(memory, *validation)
    fine = GridTuner(**{**grid, "refinements": 1}).tune(memory, *validation)
    assert fine.table[: len(coarse.table)] == coarse.table
    assert fine.refined == len(fine.table) - len(coarse.table) > 8
    assert fine.score >= coarse.score
    assert f"{fine.refined} of them around the best of the grid" in fine.summary()
    for setting in fine.table[len(coarse.table) :]:
        assert setting["sigma"] == coarse.params.sigma, "what has one candidate is fixed"
        for name in ("k", "softmax_temperature", "strength"):
            assert 0.5 <= setting[name] / getattr(coarse.params, name) <= 2
    again = GridTuner(**{**grid, "refinements": 3}).tune(memory, *validation)
    assert again.table[: len(fine.table)] == fine.table
    assert again.refined > fine.refined


def test_refinement_stays_within_what_was_searched():
    result = GridTuner(k=[2, 50, 100]).tune(filled(count=6), *rows(60, "multiclass", seed=2))
    assert {setting["k"] for setting in result.table} <= {2, 3, 6}


@pytest.mark.parametrize(("task", "bound"), [("multiclass", 0.02), ("multilabel", 0.005)])
def test_the_bound_on_lost_answers_is_kept(task, bound):
    memory, (embeddings, outputs, targets) = filled(task, count=300), rows(200, task, seed=2)
    free = GridTuner(noise=0).tune(memory, embeddings, outputs, targets)
    bounded = GridTuner(noise=0, max_negative_flip_rate=bound).tune(memory, embeddings, outputs, targets)

    def lost(params):
        memory.params = params
        base = right(memory.task.predict(outputs).numpy(), targets, task)
        return float((base & ~right(memory.predict(embeddings, outputs).numpy(), targets, task)).mean())

    assert lost(free.params) > bound >= lost(bounded.params)
    assert free.score > bounded.score > bounded.base_score
    allowed = [row["score"] for row in bounded.table if row["negative_flip_rate"] <= bound]
    assert bounded.score == max(allowed)


def test_a_bound_that_no_setting_keeps_switches_the_memory_off():
    memory, validation = filled(count=300), rows(200, "multiclass", seed=2)
    with pytest.warns(
        ResMemWarning, match=r"no setting helps within max_negative_flip_rate=0 \(without that bound the"
    ):
        result = GridTuner(**{**GRID, "strength": [1.5]}, max_negative_flip_rate=0).tune(memory, *validation)
    assert result.params.strength == 0
    assert (result.score, result.best_objective) == (result.base_score, result.base_objective)


def test_a_gain_that_is_luck_switches_the_memory_off():
    """Random labels: of a thousand settings some gain, on most draws."""
    lucky = 0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        embeddings, outputs, _ = rows(300, "multiclass", seed=1)
        memory = LocalMemory()
        memory.add(embeddings, outputs, torch.randint(0, 3, (300,), generator=generator))
        validation = rows(300, "multiclass", seed=10 + seed)
        with pytest.warns(ResMemWarning, match="does not help"):
            result = GridTuner().tune(memory, *validation)
        assert result.params.strength == 0
        best = max(row["score"] for row in result.table)
        assert ("is within the noise" in result.summary()) <= (best > result.base_score)
        lucky += GridTuner(noise=0, refinements=0).tune(memory, *validation).params.strength > 0
    assert lucky, "without regard to noise the memory would stay on"
