"""Candidates in bfloat16: none that matters is missing, whatever the keys; and the exact search that uses them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_resmem.memory.search import rough
from lightning_resmem.memory.search.exact import ExactIndex
from tests import oracle


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier(keys: Tensor) -> Tensor:
    keys[7] *= 1000
    return keys


DATA = {
    "normal": lambda n, d: randn(n, d),
    "features after a ReLU": lambda n, d: randn(n, d).relu() * 3,
    "far from zero": lambda n, d: randn(n, d) + 100,
    "tiny": lambda n, d: randn(n, d) * 1e-9,
    "large": lambda n, d: randn(n, d) * 1e12,
    "one outlier": lambda n, d: outlier(randn(n, d)),
    "very different norms": lambda n, d: randn(n, d) * randn(n, 1, seed=3).exp().square(),
    "clusters": lambda n, d: randn(8, d, seed=4)[torch.arange(n) % 8] + 0.01 * randn(n, d),
    "one direction": lambda n, d: randn(n, 1) * torch.ones(d),
}


@pytest.fixture(params=["torch", "compiled"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two looks at the products."""
    if request.param == "torch":
        monkeypatch.setattr(rough, "_fused", lambda: None)
    elif rough._fused() is None:
        pytest.skip("needs Numba and AVX-512 BF16")
    name: str = request.param
    return name


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("rows", "width", "wanted"), [(9000, 16, 40), (33000, 3, 100), (8192, 200, 25)])
def test_a_key_that_is_no_candidate_is_farther_than_the_limit(data: str, rows: int, width: int, wanted: int) -> None:
    keys = DATA[data](rows, width)
    queries = torch.cat([keys[:20], DATA[data](20, width) * 1.1, torch.zeros(1, width)])
    found = rough.Screen(keys, keys.mean(dim=0)).candidates(queries, wanted)
    assert found is not None
    positions, limits = found
    assert (positions.diff(dim=1)[positions[:, 1:] >= 0] > 0).all()
    for row, candidates in enumerate(positions):
        away = (keys.double() - queries[row].double()).square().sum(dim=1)
        others = torch.ones(rows, dtype=torch.bool)
        others[candidates[candidates >= 0]] = False
        assert int(others.sum()) <= rows - wanted or limits[row] == -torch.inf
        assert bool((away[others] > limits[row]).all())


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("data", ["normal", "features after a ReLU"])
def test_the_limit_is_beyond_the_neighbours_of_nearly_all_queries(data: str) -> None:
    keys, k = DATA[data](20_000, 64), 53
    queries = DATA[data](20_300, 64)[20_000:]
    found = rough.Screen(keys, keys.mean(dim=0)).candidates(queries, wanted=82)
    assert found is not None
    farthest = torch.cdist(queries, keys).kthvalue(k, dim=1).values
    assert ((farthest.square() < found[1]).float().mean()) > 0.95
    assert found[0].shape[1] < 164


def test_none_where_squares_overflow_or_vanish_or_nothing_can_be_told_apart(loop: str) -> None:
    keys = randn(9000, 4)
    for scale in (1e16, 1e-14, 0.0):
        scaled = keys * scale
        assert rough.Screen(scaled, scaled.mean(dim=0)).candidates(scaled[:10], 20) is None
    equal = torch.ones(33_000, 4)
    found = rough.Screen(equal, torch.zeros(4)).candidates(equal[:10], 20)
    if loop == "torch":
        assert found is None
    else:  # as many candidates as wanted, and a limit that says that there may be more as near
        assert found is not None
        assert (found[1] <= 0).all()


def test_a_query_among_too_many_equal_keys_is_left_to_float32(loop: str) -> None:
    keys = randn(33_000, 8)
    keys[1000:3000] = keys[1000]
    found = rough.Screen(keys, keys.mean(dim=0)).candidates(keys[900:1300], 20)
    assert found is not None
    positions, limits = found
    assert positions.shape[1] <= 160
    assert (limits[100:] <= 0).all()
    assert (limits[:100] > 0).all()
    if loop == "torch":
        assert (limits[100:] == -torch.inf).all()
        assert (positions[100:] == -1).all()


@pytest.mark.parametrize("order", ["from far to near", "from near to far"])
def test_no_order_of_the_keys_is_slow_to_find_the_nearest_in(order: str) -> None:
    if rough._fused() is None:
        pytest.skip("needs Numba and AVX-512 BF16")
    keys = randn(40_000, 8)
    away = keys.square().sum(dim=1).argsort(descending=order == "from far to near")
    found = rough.Screen(keys[away], keys.mean(dim=0)).candidates(torch.zeros(60, 8), 20)
    assert found is not None
    positions, limits = found
    assert (limits > 0).all()
    assert {*range(20)} <= {*(positions[7] if order == "from near to far" else 39_999 - positions[7]).tolist()}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 5, 6, 7, 95, 200])
def test_any_number_of_queries_and_threads(queries: int, threads: int) -> None:
    if rough._fused() is None:
        pytest.skip("needs Numba and AVX-512 BF16")
    keys, rows = randn(9001, 7), randn(queries, 7, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rough.Screen(keys, keys.mean(dim=0)).candidates(rows, 20)
    finally:
        torch.set_num_threads(before)
    assert found is not None
    nearest = torch.cdist(rows, keys).topk(10, largest=False).indices
    assert (found[0][:, None, :] == nearest[:, :, None]).any(dim=2).all()


def test_without_numba_there_is_no_compiled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    rough._fused.cache_clear()
    try:
        assert rough._fused() is None
        keys = randn(9000, 4)
        distances, _ = ExactIndex(keys).search(keys[:3], 1)
        assert not distances.any()
    finally:
        rough._fused.cache_clear()


DAMAGED = """
import logging
import torch
from lightning_resmem.memory.search.exact import ExactIndex
logging.basicConfig(level=logging.WARNING)
keys = torch.randn(9000, 4)
print(float(ExactIndex(keys).search(keys[:3], 1)[0].max()))
"""


@pytest.mark.slow
def test_a_damaged_cache_of_numba_is_done_without(tmp_path: Path) -> None:
    if rough._fused() is None:
        pytest.skip("needs Numba and AVX-512 BF16")

    def search() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DAMAGED]
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)

    assert "Numba" not in search().stderr
    compiled = [*tmp_path.rglob("*.nbc")]
    assert compiled
    for file in compiled:
        file.write_bytes(file.read_bytes()[:100])
    finished = search()
    assert float(finished.stdout) == 0.0
    assert "delete it, or set NUMBA_CACHE_DIR" in finished.stderr


@pytest.fixture
def bfloat16_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries were searched in bfloat16, on any machine."""
    counts: list[int] = []
    real = rough.Screen.candidates

    def counted(self: rough.Screen, queries: Tensor, wanted: int) -> tuple[Tensor, Tensor] | None:
        counts.append(len(queries))
        return real(self, queries, wanted)

    monkeypatch.setattr(rough, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(rough.Screen, "candidates", counted)
    return counts


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("data", ["normal", "far from zero", "clusters", "very different norms", "one direction"])
def test_the_index_finds_the_nearest_either_way(data: str, dtype: torch.dtype, bfloat16_counts: list[int]) -> None:
    keys = DATA[data](16_500, 12).to(dtype)
    keys[3000:3020] = keys[5]
    queries = torch.cat([keys[:20].float(), DATA[data](150, 12) * 1.01])
    index = ExactIndex(keys)
    distances, positions = index.search(queries, 10)
    assert bfloat16_counts == [170]
    expected, _ = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), 10)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5)
    away = np.linalg.norm(keys.double().numpy()[positions.numpy()] - queries.double().numpy()[:, None], axis=2)
    np.testing.assert_allclose(away, expected, rtol=1e-5)


@pytest.mark.usefixtures("loop")
def test_the_index_finds_the_same_as_without(bfloat16_counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = randn(40_001, 32).relu(), randn(4500, 32, seed=1).relu()
    keys[100:140] = keys[3]
    queries[:5] = keys[3]
    with_it = ExactIndex(keys).search(queries, 20)
    assert bfloat16_counts == [4096, 404]
    monkeypatch.setattr(rough, "_multiplies_bfloat16", lambda: False)
    without = ExactIndex(keys).search(queries, 20)
    assert len(bfloat16_counts) == 2
    assert torch.equal(with_it[1], without[1])
    assert torch.equal(with_it[0], without[0])


@pytest.mark.usefixtures("loop")
def test_the_index_survives_a_query_that_bfloat16_does_not_suffice_for(bfloat16_counts: list[int]) -> None:
    keys = randn(9000, 6)
    keys[:900] = keys[0]
    index, crowded = ExactIndex(keys), keys[:1]
    for queries in (crowded, torch.full((1, 6), 1e18), randn(300, 6, seed=2), crowded):
        distances, _ = index.search(queries, 10)
        expected, _ = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), 10)
        np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5)
    assert bfloat16_counts == [1, 1, 300, 1]


@pytest.mark.usefixtures("loop")
def test_keys_that_are_not_kept_in_bfloat16_give_the_same(
    bfloat16_counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, queries = randn(50_000, 8), randn(130, 8, seed=1)
    kept = ExactIndex(keys).search(queries, 10)
    monkeypatch.setattr(rough, "_CACHED_BYTES", 0)
    rounded = ExactIndex(keys).search(queries, 10)
    assert bfloat16_counts == [130, 130]
    assert torch.equal(kept[0], rounded[0])
    assert torch.equal(kept[1], rounded[1])


@pytest.mark.usefixtures("loop")
def test_the_index_gives_up_bfloat16_where_it_does_not_suffice(bfloat16_counts: list[int]) -> None:
    keys = torch.ones(20_000, 4)
    index = ExactIndex(keys)
    for _ in range(2):
        distances, positions = index.search(torch.ones(200, 4), 5)
        assert torch.equal(positions, torch.arange(5).expand(200, 5))
        assert not distances.any()
    assert bfloat16_counts == [200]


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("magnitude", [1e-25, 1e-12, 1.0, 1e13, 1e25])
def test_the_index_finds_the_nearest_at_any_magnitude(magnitude: float, bfloat16_counts: list[int]) -> None:
    keys = randn(9000, 6) * magnitude
    index, far = ExactIndex(keys), torch.full((1, 6), 1e20)
    for queries in (randn(130, 6, seed=1) * magnitude, torch.cat([keys[:3], far, far * 1e18]), keys[:3] * 1.1):
        distances, positions = index.search(queries, 10)
        expected, _ = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), 10)
        np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5)
        away = np.linalg.norm(keys.double().numpy()[positions.numpy()] - queries.double().numpy()[:, None], axis=2)
        np.testing.assert_allclose(away, expected, rtol=1e-5)
    assert bfloat16_counts == ([130, 5, 3] if magnitude in (1.0, 1e13) else [])


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_candidate(dtype: torch.dtype) -> None:
    keys, queries = randn(9000, 6) + 3, randn(40, 6, seed=1) + 3
    expected = rough.Screen(keys, keys.mean(dim=0)).candidates(queries, 20)
    torch.set_default_dtype(dtype)
    try:
        found = rough.Screen(keys, keys.mean(dim=0)).candidates(queries, 20)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None
    assert expected is not None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
