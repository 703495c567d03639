"""Rows with times: a query recalls only what was known when it was asked. Against ResMem in float64."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_resmem import (
    FaissIndex,
    GridTuner,
    InputError,
    LocalMemory,
    Regression,
    ResMemParams,
    ResMemWarning,
    StorageError,
    explain,
    label_errors,
)
from lightning_resmem.memory.search import precise
from lightning_resmem.memory.storage import manifest
from lightning_resmem.memory.times import as_times
from lightning_resmem.model.times import read_times
from tests import oracle

PARAMS = ResMemParams(k=5, sigma=0.7, strength=0.8)


class Dated:
    """Rows whose targets are known some time after they were asked for, in no order of time, and queries."""

    def __init__(self, rows: int = 200, queries: int = 40, delay: int = 8) -> None:
        self.keys, self.outputs, self.targets = torch.randn(rows, 4), torch.randn(rows, 3), torch.randn(rows, 3)
        asked_at = torch.randint(0, 100, (rows,))
        self.times = torch.stack([asked_at, asked_at + delay], dim=1)
        self.ids = torch.randperm(3 * rows)[:rows]
        self.queries, self.query_outputs = torch.randn(queries, 4), torch.randn(queries, 3)
        # From before the first row was known to after the last.
        self.asked_at = torch.linspace(-5, 120, queries).round()

    def filled(self, **options: object) -> LocalMemory:
        memory = LocalMemory(Regression(), PARAMS, **options)
        for part in torch.arange(len(self.ids)).split(64):
            self.add_to(memory, part)
        return memory

    def add_to(self, memory: LocalMemory, rows: torch.Tensor) -> None:
        columns = (self.keys, self.outputs, self.targets, self.ids, self.times)
        memory.add(*(column[rows] for column in columns))

    def neighbors(self, k: int, queries: np.ndarray | None = None, asked_at: np.ndarray | None = None):
        """Distances and ids, each query among the rows that it may see."""
        queries = self.queries.numpy() if queries is None else queries
        asked_at = self.asked_at.numpy() if asked_at is None else asked_at
        found = []
        for query, time in zip(queries, asked_at, strict=True):
            seen = self.times[:, 1].numpy() <= time
            found.append(oracle.neighbors(self.keys.numpy()[seen], self.ids.numpy()[seen], query[None], k))
        return tuple(np.concatenate(part) for part in zip(*found, strict=True))

    def check(self, memory: LocalMemory) -> None:
        """A memory answers each query from what was known."""
        distances, ids = self.neighbors(PARAMS.k)
        asked = memory.at(self.asked_at)
        found = asked.search(self.queries, PARAMS.k)
        np.testing.assert_array_equal(found.ids.numpy(), ids)
        np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-5)
        places = np.array([np.flatnonzero(self.ids.numpy() == i)[0] if i >= 0 else -1 for i in ids.flat])
        residuals = self.targets.double().numpy() - self.outputs.double().numpy()
        added = oracle.weighted_sum(places.reshape(ids.shape), oracle.weights(distances, PARAMS.sigma), residuals)
        expected = self.query_outputs.numpy() + PARAMS.strength * added
        predicted = asked.predict(self.queries, self.query_outputs)
        np.testing.assert_allclose(predicted.numpy(), expected, atol=1e-5)
        nobody = torch.from_numpy((ids < 0).all(axis=1))
        assert 0 < nobody.sum() < len(nobody)
        answers = asked.predictions(self.queries, self.query_outputs)
        for answer in answers:  # by the base alone
            assert torch.equal(answer[nobody], self.query_outputs[nobody])


def test_a_query_sees_what_was_known() -> None:
    data = Dated()
    data.check(data.filled())


def test_many_keys_and_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of keys in which a query sees nothing, a few, or all; equal keys, which have to be scanned for."""
    data = Dated(rows=6000, queries=60, delay=1)
    data.keys[::3] = data.keys[0]
    monkeypatch.setattr(precise, "_CPU_KEYS", 256)
    monkeypatch.setattr(precise, "_SPARE", 1)
    data.check(data.filled())


def test_the_moment_itself_counts_and_a_single_time_is_that_of_all() -> None:
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]), times=torch.tensor([[0, 3], [1, 4]]))
    for time, expected in ((2.999, [-1, -1]), (3, [0, 0]), (np.float64(4.0), [0, 1])):
        assert memory.at(time).search(torch.eye(2), 1).ids[:, 0].tolist() == expected
    assert memory.at(None) is memory


def test_microseconds_are_told_apart() -> None:
    now = 1_700_000_000_000_000
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add([[0.0]], [[0.0, 0.0]], [0], times=[[now, now + 1]])
    assert memory.at([now, now + 1]).search([[0.0], [0.0]], 1).ids.tolist() == [[-1], [0]]
    with pytest.raises(InputError, match="microseconds"):
        memory.at(now * 1000)
    with pytest.raises(InputError, match="NaN"):
        memory.at(torch.nan)


def test_edits_copies_and_files_keep_times(tmp_path: Path) -> None:
    data = Dated()
    memory = data.filled()
    memory.build()
    first = data.ids[:50]
    memory.remove(first)
    data.add_to(memory, torch.arange(50))
    data.targets[:9] += 1
    memory.update(data.ids[:9], targets=data.targets[:9])
    data.check(memory)
    data.check(copy.deepcopy(memory))
    data.check(pickle.loads(pickle.dumps(memory)))
    memory.save(tmp_path / "memory")
    data.check(LocalMemory.load(tmp_path / "memory"))
    data.check(LocalMemory.load(tmp_path / "memory", mmap=True))
    memory.remove(data.ids)
    memory.add(data.keys, data.outputs, data.targets, data.ids)  # no row has times any more
    memory.predict(data.queries, data.query_outputs)


def test_a_release_that_knows_no_times_refuses_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dated()
    data.filled().save(tmp_path / "memory")
    monkeypatch.setattr(manifest, "_READABLE", (1, 2))
    with pytest.raises(StorageError, match="format version 3"):
        LocalMemory.load(tmp_path / "memory")


def test_what_lacks_times_is_refused_by_name() -> None:
    data = Dated()
    memory = data.filled()
    with pytest.raises(InputError, match=r"memory.at\(now\)"):
        memory.predict(data.queries, data.query_outputs)
    with pytest.raises(InputError, match="40 times for 3 queries"):
        memory.at(data.asked_at).search(data.queries[:3], 1)
    with pytest.raises(InputError, match="new ones none"):
        memory.add(data.keys, data.outputs, data.targets)
    without = LocalMemory(Regression(), PARAMS)
    without.add(data.keys, data.outputs, data.targets)
    with pytest.raises(InputError, match="its rows have none"):
        without.at(data.asked_at).predict(data.queries, data.query_outputs)
    with pytest.raises(InputError, match=r"expected \(200, 2\)"):
        without.add(data.keys, data.outputs, data.targets, times=data.times[:, 1])
    approximate = LocalMemory(Regression(), PARAMS, index=FaissIndex("HNSW16"))
    with pytest.raises(InputError, match=r"HNSW16.*exact"):
        approximate.add(data.keys, data.outputs, data.targets, times=data.times)


def test_the_tuner_sees_what_was_known() -> None:
    """Rows of a later time undo what is right before: whoever sees them chooses another strength."""
    keys = torch.randn(400, 3)
    outputs = torch.zeros(400, 1)
    targets = torch.ones(400, 1)
    targets[200:] = -1  # from time 100 on
    times = torch.arange(400)[:, None] * torch.tensor([0.5, 0.5]) + torch.tensor([0.0, 1.0])
    memory = LocalMemory(Regression())
    memory.add(keys, outputs, targets, times=times)
    val = torch.randn(100, 3), torch.zeros(100, 1), torch.ones(100, 1)
    tuned = GridTuner().tune(memory.at(torch.linspace(50, 99, 100)), *val)
    assert tuned.score == pytest.approx(0, abs=1e-6)
    assert GridTuner().tune(memory.at(1000.0), *val).score > 0.5


def test_rows_of_few_moments_are_few_to_the_tuner() -> None:
    at = torch.arange(10).repeat_interleave(100)
    targets = torch.tensor([2.0, -1, 1.2, -1, 1.5, -1.2, 1, -1, 2.5, 0])[at][:, None]  # one shock for all of a moment
    val = torch.zeros(1000, 1), torch.zeros(1000, 1), targets
    row = torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)
    plain, dated = LocalMemory(task=Regression()), LocalMemory(task=Regression())
    plain.add(*row)
    val[0][:] = 1.0  # not at the row's own place
    dated.add(*row, times=torch.tensor([[-2, -1]]))
    tuner = GridTuner(k=[1], strength=[0.25], refinements=0)
    assert tuner.tune(plain, *val).params.strength == 0.25
    with pytest.warns(ResMemWarning, match="within the noise"):
        assert tuner.tune(dated.at(at), *val).params.strength == 0


def test_leaving_a_row_out_sees_what_was_known() -> None:
    """Rows are what the next one needs to know: seen from any time, the memory is perfect, and useless when asked."""
    rows = torch.arange(300)
    keys, targets = (rows // 2)[:, None].float(), torch.randn(150).repeat_interleave(2)[:, None]
    asked_at = torch.arange(300.0)
    for delay, helps in ((0.5, True), (500.0, False)):
        memory = LocalMemory(Regression())
        memory.add(keys, torch.zeros(300, 1), targets, times=torch.stack([asked_at, asked_at + delay], dim=1))
        result = GridTuner(k=[1]).tune_leave_one_out(memory)
        assert (result.score < 0.8 * result.base_score) is helps


def test_explanations_and_measured_params_see_what_was_known() -> None:
    data = Dated()
    _, ids = data.neighbors(PARAMS.k)
    memory = data.filled()
    told = explain(memory.at(data.asked_at), data.queries, data.query_outputs, top=3)
    listed = [row["id"] for row in told.rows if row["query"] == len(ids) - 1 and row["id"] is not None]
    assert listed[:3] == ids[-1, :3].tolist()
    assert len(label_errors(memory).ids) == len(data.ids)
    memory.params = PARAMS
    measured = LocalMemory(Regression())
    data.add_to(measured, torch.arange(200))
    distances, own = data.neighbors(11, data.keys.numpy(), data.times[:, 0].numpy())
    means = [away[seen >= 0].mean() for away, seen in zip(distances, own, strict=True) if (seen >= 0).any()]
    middle = np.sort(means)
    assert measured.params.sigma == pytest.approx(middle[(len(middle) - 1) // 2], rel=1e-5)


@pytest.mark.parametrize(
    "times",
    [
        torch.tensor([1_700_000_100.0]),  # float32
        torch.tensor([20.0], dtype=torch.float16),
        torch.tensor([20.0], dtype=torch.bfloat16),
        torch.tensor([1_700_000_100]) + 0.5,
    ],
)
def test_times_that_were_rounded_are_refused(times: torch.Tensor) -> None:
    memory = Dated().filled()
    with pytest.raises(InputError, match=r"which rounds times.*float64 or int64"):
        memory.at(times)
    with pytest.raises(InputError, match="which rounds times"):
        as_times("times_fn", read_times(lambda batch: (batch, batch), times))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_of_any_width_are_times(dtype: torch.dtype) -> None:
    assert as_times("asked_at", torch.tensor([0, 100], dtype=dtype)).tolist() == [0.0, 100.0]


def test_numbers_of_python_are_not_rounded() -> None:
    memory = LocalMemory(params=ResMemParams(k=1))
    asked_at = [1_700_000_000.0, 1_700_000_040.0]
    memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]), times=[[t, t + 60.5] for t in asked_at])
    queries = torch.tensor([[0.0, 1.0]])
    for now, seen in ((1_700_000_060.25, -1), (1_700_000_060.5, 0), (1_700_000_100.25, 0), (1_700_000_100.5, 1)):
        assert memory.at(now).search(queries, 1).ids.item() == seen
        assert memory.at([now]).search(queries, 1).ids.item() == seen
    assert read_times(lambda batch: (batch, [t + 60.5 for t in batch]), asked_at)[1, 1] == 1_700_000_100.5


def test_explanations_where_nothing_was_known() -> None:
    data = Dated()
    told = explain(data.filled().at(-1000.0), data.queries, data.query_outputs, top=3)
    assert (told.neighbors.ids == -1).all()
    torch.testing.assert_close(told.predictions.resmem, told.predictions.base)
