"""Exact search on a GPU: the neighbours of float64, in the bytes and with the waits that are promised."""

import threading
import warnings

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemParams
from lightning_resmem.memory.search import groups, replay
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.groups import Groups
from tests.hard_keys import DATA, Draw, check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")]

GPU = torch.device("cuda", 0)
MIB = 2**20


draw = Draw(GPU)


@pytest.fixture(params=["triton", "groups", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With kernels, with those for few keys left out, and as without Triton."""
    if request.param == "torch":
        monkeypatch.setattr(groups, "runs_on", lambda device: False)
    else:
        assert groups.runs_on(GPU), "Triton does not work here: see the log"
    if request.param == "groups":
        monkeypatch.setattr(groups, "_FEW", 0)
    name: str = request.param
    return name


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "count", "k"),
    [
        (1, 3, 5, 1),
        (700, 12, 3000, 20),
        (5000, 64, 8192, 53),
        (1000, 1, 40, 53),
        (20_000, 7, 300, 53),
        (45_001, 64, 1000, 53),
        (30_000, 96, 17, 10),
        (50_000, 128, 1, 53),
        (50_000, 130, 70, 20),
        (40_000, 512, 200, 53),
        (9_000, 4096, 9, 5),
        (150_000, 16, 5, 2048),
        (30_000, 8, 3, 5000),
    ],
)
def test_the_neighbours_of_float64(rows: int, width: int, count: int, k: int, dtype: torch.dtype) -> None:
    keys, queries = draw.normal(rows, width).to(dtype), draw.normal(count, width, seed=1)
    check(keys, queries, ExactIndex(keys).search(queries, k), k)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("half_copy", [True, False])
@pytest.mark.parametrize("data", DATA)
def test_whatever_the_keys(data: str, half_copy: bool) -> None:
    keys = DATA[data](draw, 20_000, 24)
    queries = torch.cat([keys[:20], DATA[data](draw, 100, 24) * 1.1, torch.zeros(1, 24, device=GPU)])
    queries = queries.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    check(keys, queries, ExactIndex(keys, half_copy).search(queries, 53), 53)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_queries_of_another_magnitude_than_the_keys(scale: float) -> None:
    keys = draw.normal(20_000, 8) * scale
    magnitudes = torch.tensor([1e-30, 1e-20, 1e10, 1e20, 1e25, 1e38], device=GPU)
    queries = magnitudes[:, None] * torch.ones(8, device=GPU)
    check(keys, queries, ExactIndex(keys).search(queries, 10), 10)


@pytest.mark.usefixtures("way")
def test_equal_keys_are_found_by_lowest_position() -> None:
    constant = torch.full((20_000, 8), 0.3, device=GPU)
    assert ExactIndex(constant).search(draw.normal(3, 8), 40)[1].tolist() == [list(range(40))] * 3
    thrice = draw.normal(10_000, 16).repeat_interleave(3, dim=0)
    assert ExactIndex(thrice).search(thrice[:2], 2)[1].tolist() == [[0, 1]] * 2
    assert ExactIndex(thrice).search(thrice[:0], 2)[1].shape == (0, 2)


@pytest.mark.parametrize("width", [64, 128, 512])
def test_ordinary_queries_are_sure_at_once(width: int) -> None:
    for data in ("normal", "features after a ReLU", "far from zero", "every key twice"):
        keys, queries = DATA[data](draw, 100_000, width), DATA[data](draw, 101_000, width)[100_000:]
        unsure = Groups(keys, half_copy=True).nearest(queries, 53).unsure
        assert unsure is None or len(unsure) < 0.01 * len(queries), data


@pytest.mark.parametrize("rows", [500, 50_000])
@pytest.mark.usefixtures("way")
def test_the_gpu_is_waited_for_once(rows: int) -> None:
    keys, queries = draw.normal(rows, 32), draw.normal(3000, 32, seed=1)
    index = ExactIndex(keys)
    index.search(queries, 10)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            index.search(queries, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in caught if "synchronizing" in str(one.message)]) <= 1


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("half_copy", [True, False])
def test_peak_memory_is_bounded(half_copy: bool) -> None:
    rows, width = 2_000_000, 64
    keys, queries = draw.normal(rows, width), draw.normal(8192, width, seed=1)
    index = ExactIndex(keys, half_copy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    index.search(queries, 53)
    copied = rows * width * 2 if half_copy else 0
    assert torch.cuda.max_memory_allocated() - before < copied + 8 * rows + 512 * MIB
    assert index.nbytes <= groups.kept_bytes(rows, width, keys.dtype, half_copy) + MIB


@pytest.mark.usefixtures("way")
def test_the_users_contexts_change_nothing() -> None:
    keys, queries = draw.normal(50_000, 48), draw.normal(300, 48, seed=1)
    expected = ExactIndex(keys).search(queries, 20)
    index, stream = ExactIndex(keys), torch.cuda.Stream(GPU)
    stream.wait_stream(torch.cuda.current_stream(GPU))
    with torch.cuda.stream(stream), torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        inside = index.search(queries, 20)
    torch.set_float32_matmul_precision("medium")
    try:
        after = index.search(queries, 20)  # on another stream, which did not prepare the index
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.cuda.synchronize()
    for found in (inside, after):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("rows", "k"), [(700, 20), (40_000, 53)])
def test_a_search_that_is_replayed_finds_the_same(rows: int, k: int) -> None:
    keys = draw.normal(rows, 40)
    counts = (5, 8, 7, 8, 1, 1, 1, 130, 140, 200, 0, 1030, 1040, 1030)
    asked = [draw.normal(count, 40, seed=seed) for seed, count in enumerate(counts, 1)]
    index = ExactIndex(keys)
    found = []
    for number, queries in enumerate(asked):
        with torch.inference_mode(mode=number % 2 == 1):
            found.append(index.search(queries, k))
    assert set(index._grouped._replays._graphs) == {(8, k), (1, k), (256, k), (1030, k)}
    for queries, each in zip(asked, found, strict=True):  # at the end: none was written over by a later one
        check(keys, queries, each, k)


def test_replays_of_threads_and_streams_do_not_meet() -> None:
    keys, wrong = draw.normal(30_000, 24), []
    index = ExactIndex(keys)
    asked = [draw.normal(16, 24, seed=seed) for seed in range(1, 33)]
    expected = [ExactIndex(keys).search(queries, 10) for queries in asked]
    for queries in asked[:2]:  # the main thread records
        index.search(queries, 10)
    torch.cuda.synchronize()

    def search(first: int) -> None:
        stream = torch.cuda.Stream(GPU)
        with torch.cuda.stream(stream):
            for number in list(range(first, 32, 4)) * 3:
                found = index.search(asked[number], 10)
                wrong.extend(number for one, other in zip(found, expected[number], strict=True) if not one.equal(other))

    threads = [threading.Thread(target=search, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert set(index._grouped._replays._graphs) == {(16, 10)}


def test_no_more_is_recorded_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = draw.normal(5000, 8), draw.normal(4, 8, seed=1)
    for limit, most in (("_GRAPHS", 2), ("_KEPT_BYTES", 450)):
        with monkeypatch.context() as patch:
            patch.setattr(replay, limit, most)
            index = ExactIndex(keys)
            for k in (1, 2, 3, 1, 4, 3):
                for _ in range(3):
                    check(keys, queries, index.search(queries, k), k)
            assert [k for _, k in index._grouped._replays._graphs] == [1, 2]
            assert index.nbytes > index._grouped._replays.nbytes > 0


def test_another_thread_replays_and_does_not_record() -> None:
    keys, queries = draw.normal(5000, 8), draw.normal(4, 8, seed=1)
    index, drawn = ExactIndex(keys), []

    def search() -> None:
        for _ in range(4):
            check(keys, queries, index.search(queries, 5), 5)
        drawn.append(torch.rand(3, device=GPU))

    for recorded in (0, 1):
        thread = threading.Thread(target=search)
        thread.start()
        thread.join(timeout=60)
        assert len(drawn) == recorded + 1
        assert len(index._grouped._replays._graphs) == recorded
        index.search(queries, 5)


def test_what_cannot_be_recorded_is_found_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = draw.normal(5000, 8), draw.normal(4, 8, seed=1)
    index = ExactIndex(keys)
    index.search(queries, 5)
    smallest, recording = groups._selecting().smallest, []

    def fail(*given: object) -> object:
        if torch.cuda.is_current_stream_capturing():
            recording.append(given)
            raise torch.cuda.OutOfMemoryError("no room")
        return smallest(*given)

    monkeypatch.setattr(groups._selecting(), "smallest", fail)
    for _ in range(3):
        check(keys, queries, index.search(queries, 5), 5)
    assert len(recording) == 1
    assert not index._grouped._replays._graphs
    assert torch.rand(3, device=GPU).isfinite().all()  # the generator is as before


def test_padding_makes_no_query_unsure() -> None:
    keys = torch.nn.functional.normalize(draw.normal(4000, 128))  # as far from zero, all of them
    index, bad = ExactIndex(keys), keys[:4].clone()
    bad[3] = torch.nan
    for count in (4, 3, 3, 3):
        queries = keys[:count] + 0.01 * draw.normal(count, 128, seed=1)
        check(keys, queries, index.search(queries, 10), 10)
    with pytest.raises(InputError):
        index.search(bad, 10)
    check(keys, keys[:3], index.search(keys[:3], 10), 10)
    assert index._unsure <= 1  # the one that is not finite is not searched again


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [40, 20_000])
def test_queries_that_are_not_finite_are_refused(rows: int) -> None:
    keys, queries = draw.normal(rows, 12), draw.normal(6, 12, seed=1)
    index = ExactIndex(keys)
    for bad in (torch.nan, torch.inf, -torch.inf) * 2:
        asked = queries.clone()
        asked[4, 3] = bad
        with pytest.raises(InputError, match="rows 4"):
            index.search(asked, 30)
        check(keys, queries, index.search(queries, 30), 30)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    keys, queries = draw.normal(50_000, 48), draw.normal(300, 48, seed=1)
    expected = ExactIndex(keys).search(queries, 20)
    assert torch.cuda.current_device() == 0
    found = ExactIndex(keys.to("cuda:1")).search(queries.to("cuda:1"), 20)
    assert torch.equal(found[1].to(GPU), expected[1])


def test_a_memory_counts_what_its_search_keeps() -> None:
    for half_copy in (True, False):
        memory = LocalMemory(params=ResMemParams(k=10, sigma=1.0), half_copy=half_copy)
        memory.to(GPU)
        memory.add(draw.normal(60_000, 40), draw.normal(60_000, 4), torch.zeros(60_000, dtype=torch.long, device=GPU))
        memory.build()
        before = memory.stats()["bytes"]
        memory.search(draw.normal(5, 40), 10)
        kept = memory.stats()["bytes"] - before
        expected = groups.kept_bytes(60_000, 40, torch.float32, half_copy)
        assert np.isclose(kept, expected, rtol=0.05)
        assert memory.estimate_bytes(60_000, 40, 4)["index"] == expected + groups.WORK_BYTES
