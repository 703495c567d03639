"""Exact search against brute force in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_resmem import InputError
from lightning_resmem.memory.search import measuring, precise, rough
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.interface import Found
from lightning_resmem.memory.search.precise import Precise
from tests import oracle
from tests.hard_keys import DATA, Draw, check

draw = Draw()


@pytest.fixture(autouse=True, params=[precise._FEW_MEASURED, 0], ids=["few", "blocks"])
def _queries_that_are_few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precise, "_FEW_MEASURED", request.param)


def _check(keys: torch.Tensor, queries: torch.Tensor, k: int) -> None:
    """Distances are the oracle's to float tolerance, every position is as near as its place says, none comes twice."""
    distances, positions = ExactIndex(keys).search(queries, k)
    expected, _ = oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), k)
    scale = np.abs(keys.double().numpy()).max() + np.abs(queries.double().numpy()).max()
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=1e-6 * scale)
    away = np.linalg.norm(keys.double().numpy()[positions.numpy()] - queries.double().numpy()[:, None], axis=2)
    np.testing.assert_allclose(away, expected, rtol=1e-5, atol=1e-6 * scale)
    assert all(len(set(row)) == k for row in positions.tolist())
    assert (np.diff(distances.numpy(), axis=1) >= 0).all()


@pytest.mark.parametrize("rows", [1, 31, 33, 5000, 20_011])
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_same_neighbors_as_brute_force(rows: int, width: int, k: int) -> None:
    _check(torch.randn(rows, width), torch.randn(7, width), min(k, rows))


def test_all_rows_are_neighbors() -> None:
    _check(torch.randn(9000, 3), torch.randn(4, 3), 9000)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_equal_keys_are_found_by_lowest_position(k: int) -> None:
    distances, positions = ExactIndex(torch.full((20_000, 8), 0.3)).search(torch.randn(3, 8), k)
    assert positions.tolist() == [list(range(k))] * 3
    assert (distances == distances[:, :1]).all()


def test_duplicated_keys_are_found_by_lowest_position() -> None:
    keys = torch.randint(0, 3, (20_000, 3)).float()  # 27 different keys, some 740 times each
    queries = torch.randint(0, 3, (5, 3)).float()
    _, found = ExactIndex(keys).search(queries, 50)
    _, expected = oracle.neighbors(keys.numpy(), None, queries.numpy(), 50)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_keys_far_from_zero_keep_their_order(offset: float) -> None:
    keys = torch.randn(20_000, 16) + offset
    _check(keys, keys[:5] + 0.25, 20)


def test_huge_norms_in_every_direction() -> None:
    # All keys on a sphere of radius 1e6 around zero: |z|^2 - 2 q.z has no digit left for gaps below 1e5.
    keys = torch.nn.functional.normalize(torch.randn(20_000, 4), dim=1) * 1e6
    queries = keys[:4] + torch.randn(4, 4)
    _check(keys, queries, 5)
    assert ExactIndex(keys).search(keys[:4], 1)[1][:, 0].tolist() == [0, 1, 2, 3]


def test_overflowing_squares_still_give_different_rows() -> None:
    positions = ExactIndex(torch.randn(20_000, 4) * 1e25).search(torch.randn(2, 4), 5)[1]
    assert all(len(set(row)) == 5 for row in positions.tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_searched_in_float32(dtype: torch.dtype) -> None:
    keys = torch.randn(20_000, 16).to(dtype)
    _check(keys, torch.randn(5, 16), 20)


def test_no_queries() -> None:
    distances, positions = ExactIndex(torch.randn(10, 4)).search(torch.empty(0, 4), 3)
    assert distances.shape == positions.shape == (0, 3)
    assert positions.dtype == torch.int64


def test_results_do_not_depend_on_the_division_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = torch.randn(20_000, 8).round(decimals=1), torch.randn(40, 8).round(decimals=1)
    whole = ExactIndex(keys).search(queries, 30)
    monkeypatch.setattr(precise, "_blocks", lambda queries, wanted: (3, 32 * 64))
    monkeypatch.setattr(precise, "_CPU_PRODUCT", 100)
    divided = ExactIndex(keys).search(queries, 30)
    assert torch.equal(whole[0], divided[0])
    assert torch.equal(whole[1], divided[1])


@pytest.mark.parametrize("data", DATA)
def test_a_query_finds_alone_what_it_finds_among_others(data: str) -> None:
    keys = DATA[data](draw, 3000, 12)
    queries = torch.cat([keys[:8], DATA[data](draw, 12, 12) * 1.1])
    queries = queries.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    index = ExactIndex(keys)
    together = index.search(queries, 20)
    check(keys, queries, together, 20)
    for row, query in enumerate(queries):
        alone = index.search(query[None], 20)
        assert torch.equal(alone[0][0], together[0][row])
        assert torch.equal(alone[1][0], together[1][row])


@pytest.mark.parametrize(("rows", "width", "k"), [(3, 4, 2), (3, 4, 3), (3000, 64, 20)])
def test_distances_that_float32_cannot_hold(rows: int, width: int, k: int) -> None:
    keys = draw.uniform(rows, width) * 3e38
    queries = torch.cat([-keys[:2], keys[:2]])
    check(keys, queries, ExactIndex(keys).search(queries, k), k)


def test_equally_near_rows_with_times_whose_scores_overflow() -> None:
    keys, query = draw.uniform(6, 3) * 1e14, torch.full((1, 3), 1e30)
    index = ExactIndex(keys, available_at=torch.zeros(6))
    assert index.search(query, 4, torch.ones(1))[1].tolist() == index.search(query, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_rows_that_numpy_does_not_read_as_they_are() -> None:
    keys = torch.complex(torch.zeros(90, 4), draw.normal(90, 4)).conj().imag  # their sign is a bit of the tensor
    queries = keys[:3] * 1
    assert keys.is_neg()
    expected = ExactIndex(keys.resolve_neg()).search(queries, 5)
    for found in (ExactIndex(keys).search(queries, 5), ExactIndex(keys.clone()).search(keys[:3], 5)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_an_answer_keeps_no_candidates() -> None:
    for found in ExactIndex(draw.normal(500, 4)).search(draw.normal(1, 4, seed=1), 3):
        assert found.untyped_storage().nbytes() == found.nbytes


@pytest.fixture
def way_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Search on this device as on a GPU without Triton: few operations, for which nobody waits."""
    monkeypatch.setattr(measuring, "on_cpu", lambda rows: False)
    monkeypatch.setattr(rough, "is_worthwhile", lambda queries, keys, wanted: False)
    monkeypatch.setattr(precise, "_GPU_FEW", 0)
    monkeypatch.setattr(precise, "_GPU_SORTED", 0)
    return monkeypatch


@pytest.mark.parametrize("block", [30, 64, 3000, 10**6])
def test_blocks_of_a_gpu_do_not_matter(block: int, way_of_a_gpu: pytest.MonkeyPatch) -> None:
    keys, queries = draw.normal(9000, 8).round(decimals=1) + 40, draw.normal(40, 8, seed=1).round(decimals=1) + 40
    way_of_a_gpu.setattr(precise, "_blocks", lambda queries, wanted: (7, block))
    check(keys, queries, ExactIndex(keys).search(queries, 30), 30)


@pytest.mark.parametrize("few", [0, 2**22])
@pytest.mark.parametrize("data", DATA)
def test_a_gpu_without_triton(data: str, few: int, way_of_a_gpu: pytest.MonkeyPatch) -> None:
    way_of_a_gpu.setattr(precise, "_GPU_FEW", few)
    keys = DATA[data](draw, 5000, 12)
    queries = torch.cat([keys[:4], DATA[data](draw, 8, 12) * 1.1, torch.zeros(1, 12)])
    queries = queries.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    check(keys, queries, ExactIndex(keys).search(queries, 20), 20)
    queries[2, 3] = torch.nan
    with pytest.raises(InputError, match="queries has NaN or infinite entries in rows 2"):
        ExactIndex(keys).search(queries, 20)


@pytest.mark.parametrize("few", [0, 2**22])
def test_a_gpu_without_triton_finds_all_rows(few: int, way_of_a_gpu: pytest.MonkeyPatch) -> None:
    way_of_a_gpu.setattr(precise, "_GPU_FEW", few)
    keys, queries = draw.normal(900, 3).bfloat16(), draw.normal(4, 3, seed=1)
    check(keys, queries, ExactIndex(keys).search(queries, 900), 900)


def test_padding_that_is_unsure_is_not_told() -> None:
    found = Found.empty(4, 2, torch.device("cpu"))
    found.all_sure.fill_(value=False)
    found.sure.copy_(torch.tensor([True, False, True, False]))
    assert found.unsure(1) is None
    assert found.unsure(3) == torch.tensor([1])
    assert sum(tensor.nbytes for tensor in found) == Found.bytes_of(4, 2)


@pytest.mark.parametrize("columns", [20, 640, 1300, 1311])
def test_the_smallest_by_groups(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precise, "_GPU_SORTED", 0)
    scores = torch.randn(6, columns)
    scores[1, -15:] -= 10  # behind the last whole group, where there is such
    found, places = precise._smallest_by_groups(scores, 20)
    assert torch.equal(scores.gather(1, places), found)
    assert torch.equal(found.sort(dim=1).values, scores.sort(dim=1).values[:, :20])


def test_reduced_precision_of_the_user_changes_nothing() -> None:
    keys, queries = torch.randn(20_000, 64), torch.randn(8, 64, requires_grad=True)
    expected = ExactIndex(keys).search(queries.detach(), 20)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ExactIndex(keys).search(queries, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[0].requires_grad


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch >= 2.9")
@pytest.mark.parametrize("place", [0, 1, 2], ids=["everywhere", "on CPUs", "on CUDA"])
def test_reduced_precision_as_newer_versions_of_torch_set_it(place: int) -> None:
    keys, queries = torch.randn(20_000, 64), torch.randn(8, 64)
    expected = ExactIndex(keys).search(queries, 20)
    kinds: list[Any] = [torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    kinds[place].fp32_precision = "tf32"
    before = [kind.fp32_precision for kind in kinds]
    try:
        found = ExactIndex(keys).search(queries, 20)
        assert [kind.fp32_precision for kind in kinds] == before
    finally:
        for kind in kinds:
            kind.fp32_precision = "none"
    assert [kind.fp32_precision for kind in kinds] == ["none"] * 3  # none was pinned
    for part, wanted in zip(found, expected, strict=True):
        assert torch.equal(part, wanted)


def test_only_unsure_queries_are_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scans = []
    scan = Precise._scan
    monkeypatch.setattr(Precise, "_scan", lambda self, *args: scans.append(1) or scan(self, *args))
    ExactIndex(torch.randn(20_000, 32)).search(torch.randn(50, 32), 10)
    assert not scans
    ExactIndex(torch.ones(20_000, 32)).search(torch.randn(2, 32), 10)
    assert len(scans) == 2


@given(st.data())
def test_small_integer_grids(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    numbers = st.lists(st.integers(-2, 2), min_size=rows * width, max_size=rows * width)
    keys = torch.tensor(data.draw(numbers)).float().view(rows, width)
    k = data.draw(st.integers(1, rows))
    _, found = ExactIndex(keys).search(keys[:3], k)
    _, expected = oracle.neighbors(keys.numpy(), None, keys[:3].numpy(), k)
    np.testing.assert_array_equal(found.numpy(), expected)


EXTREME = {
    "1e25": lambda n, d: torch.randn(n, d) * 1e25,
    "1e38": lambda n, d: torch.rand(n, d) * 3e38,
    "1e-20": lambda n, d: torch.randn(n, d) * 1e-20,
    "1e-25": lambda n, d: torch.randn(n, d) * 1e-25,
    "1e-38": lambda n, d: torch.randn(n, d) * 1e-38,
    "1e-30 to 1e30": lambda n, d: torch.randn(n, d) * 10 ** (torch.rand(n, 1) * 60 - 30),
    "far from zero": lambda n, d: (torch.randn(n, d) + 100) * 1e-24,
}


@pytest.mark.parametrize("data", EXTREME)
@pytest.mark.parametrize("rows", [40, 9000])
def test_keys_of_any_magnitude(data: str, rows: int) -> None:
    keys = EXTREME[data](rows, 8)
    _check_relatively(keys, torch.cat([keys[:20], EXTREME[data](20, 8), torch.zeros(1, 8)]), 10)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("query", [1e-30, 1e20, 1e25, 3e38])
def test_a_query_of_another_magnitude_than_the_keys(query: float, scale: float) -> None:
    keys = torch.randn(9000, 8) * scale
    _check_relatively(keys, torch.cat([torch.full((1, 8), query), keys[:3]]), 10)


@pytest.mark.parametrize("magnitude", [1e25, 1e-25])
def test_bfloat16_keys_of_any_magnitude(magnitude: float) -> None:
    keys = (torch.randn(9000, 8) * magnitude).bfloat16()
    _check_relatively(keys, torch.randn(20, 8) * magnitude, 10)


def _check_relatively(keys: torch.Tensor, queries: torch.Tensor, k: int) -> None:
    """Each distance is the oracle's to float tolerance of itself, and that of the row that was found."""
    distances, positions = ExactIndex(keys).search(queries, k)
    most = np.finfo(np.float32).max
    expected = np.minimum(oracle.neighbors(keys.double().numpy(), None, queries.double().numpy(), k)[0], most)
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-5, atol=1e-44)
    away = np.linalg.norm(keys.double().numpy()[positions.numpy()] - queries.double().numpy()[:, None], axis=2)
    np.testing.assert_allclose(np.minimum(away, most), expected, rtol=1e-5, atol=1e-44)
    assert all(len(set(row)) == k for row in positions.tolist())


def test_distances_are_right_below_any_unit_of_the_largest_key() -> None:
    keys = torch.zeros(9000, 4)
    keys[:100] = torch.randn(100, 4) * 1e-28
    keys[100] = 1
    _check_relatively(keys[:101], keys[:20], 10)
