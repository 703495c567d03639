"""The search of `groups` in Triton's interpreter, on CPU tensors; `test_groups` runs this file in another process."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_resmem import InputError
from lightning_resmem.memory.search import exact, groups, kernels, selecting
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.groups import Groups
from lightning_resmem.memory.search.interface import Nearest
from tests import oracle
from tests.hard_keys import DATA, Draw, check

settings.register_profile("interpreted", deadline=None, derandomize=True, database=None, max_examples=8)
settings.load_profile("interpreted")


@pytest.fixture(autouse=True, scope="module")
def _few_and_large_programs() -> Iterator[None]:
    """On this device, with few keys; the interpreter takes as long for a large program as for a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "runs_on", lambda device: True)
        patch.setattr(groups, "_GROUPS", 1)
        patch.setattr(groups, "_LEAST_GROUPS", 1)
        patch.setattr(groups, "_FEW", 0)
        patch.setattr(kernels, "_MEASURED", 2048)
        patch.setattr(kernels, "_PROGRAMS", 1)
        patch.setattr(kernels, "PADDED", 512)
        yield


draw = Draw()


def signs(count: int) -> Tensor:
    """So that the mean is zero, and rounding is that of the numbers as they are."""
    return 1.0 - 2 * (torch.arange(count)[:, None] % 2)


def nearest(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distances, positions, and for which queries they are sure."""
    distances, positions, unsure = Groups(keys, half_copy=True).nearest(queries, k)
    sure = torch.ones(len(queries), dtype=torch.bool)
    if unsure is not None:
        assert len(unsure)
        sure[unsure] = False
    return distances, positions, sure


def quarter(rows: int, width: int) -> Tensor:
    return draw.uniform(rows, width) < 0.25


# Keys whose differences are those that rounding to float16 makes: 2^-11 of a number.
BOUNDARY: dict[str, Callable[[Draw, int, int], Tensor]] = {
    # The error of rounding is parallel to the query: as large in the score as the bound allows.
    **{
        f"all numbers of a key equal, within {spread}": lambda draw, n, d, spread=spread: (
            signs(n) * (1.3 + spread * draw.uniform(n, 1)) * torch.ones(d)
        )
        for spread in (0.5, 0.03, 0.002)
    },
    # The nearest keys are rounded away from the query, others towards it.
    "halfway between two float16": lambda draw, n, d: (
        signs(n) * (1.5 + 2.0**-10 * torch.where(draw.count(n)[:, None] % 50 < 2, 0.51, 1.49 * quarter(n, d)))
    ),
    "large, with small differences": lambda draw, n, d: signs(n) * DATA["small differences"](draw, n, d),
    "rings": lambda draw, n, d: (
        torch.nn.functional.normalize(draw.normal(n, d), dim=1) * (1 + draw.uniform(n, 1) * 2.0**-9)
    ),
}


@given(
    data=st.sampled_from(sorted(DATA)),
    rows=st.integers(650, 1500),
    width=st.sampled_from([1, 3, 8, 17, 64, 130]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    k=st.integers(1, 20),
    half_copy=st.booleans(),
    few=st.sampled_from([0, 2**23]),
)
def test_the_index_finds_the_nearest(
    data: str, rows: int, width: int, dtype: torch.dtype, k: int, half_copy: bool, few: int
) -> None:
    # The interpreter, other than a GPU, reads subnormal bfloat16 wrongly.
    keys = DATA[data](draw, rows, width).to(torch.float32 if data == "1e-38" else dtype)
    if not torch.isfinite(keys).all():  # what float16 cannot hold is no key
        keys = DATA[data](draw, rows, width).bfloat16()
    queries = torch.cat([keys[:3].float(), DATA[data](draw, 2, width) * 1.1, torch.zeros(1, width)])
    queries = queries.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_FEW", few)
        check(keys, queries, ExactIndex(keys, half_copy).search(queries, k), k)


@pytest.mark.parametrize(
    ("data", "dtype", "alike"),
    [(data, torch.float32, 32) for data in ("normal", "1e25", *BOUNDARY)]
    + [(data, torch.float32, 1) for data in ("very different norms", "rings")]
    + [(data, torch.float16, 32) for data in ("normal", "one direction")],
)
def test_no_key_is_nearer_than_the_minimum_of_its_group(data: str, dtype: torch.dtype, alike: int) -> None:
    keys = (DATA | BOUNDARY)[data](draw, 640 // alike, 16).repeat_interleave(alike, dim=0).to(dtype)
    queries = torch.cat([keys[::130].float(), keys[-1] * torch.linspace(0.7, 1.3, 8)[:, None]])
    index = Groups(keys, half_copy=True)
    asked = kernels.round_queries(queries, index._center, index._scale, index._typical, index._width)
    minima = index._minima(asked)[:, :20].double()
    away = torch.cdist(queries.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = away.unflatten(1, (20, 32)).amin(dim=2)
    assert (minima <= (nearest * index._scale * asked[1][4, :, None].double()).square()).all()
    chosen, screen = index._near_groups(queries, wanted=4)
    assert screen is not None
    limits, root = screen.limits.double().amax(dim=1), screen.numbers[4].double()
    reach = (limits * screen.kept).sqrt() / root * screen.unit
    rest = nearest.scatter(1, chosen.clamp_max(19), torch.inf)
    assert not (rest < reach[:, None]).any()


@pytest.mark.parametrize(
    ("data", "width"), [*((data, 16) for data in BOUNDARY), ("halfway between two float16", 1), ("rings", 1)]
)
def test_what_is_sure_is_right_however_keys_are_rounded(data: str, width: int) -> None:
    keys = BOUNDARY[data](draw, 900, width)
    queries = torch.cat([keys[:4], keys[100:104] * (1 + 2.0**-12), torch.full((1, width), 1.5)])
    distances, positions, sure = nearest(keys, queries, 3)
    assert sure.dtype == torch.bool
    check(keys, queries[sure], (distances[sure], positions[sure]), 3)


@pytest.mark.parametrize(
    ("data", "width"),
    [
        ("normal", 200),
        ("features after a ReLU", 24),
        ("far from zero", 24),
        ("one outlier", 24),
        ("every key twice", 24),
        ("1e-30", 24),
    ],
)
def test_ordinary_queries_are_sure(data: str, width: int) -> None:
    keys = DATA[data](draw, 1500, width)
    queries = torch.cat([keys[20:23], DATA[data](draw, 1503, width)[1500:]])
    distances, positions, sure = nearest(keys, queries, 5)
    assert sure.all()
    check(keys, queries, (distances, positions), 5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_queries_of_another_magnitude_than_the_keys(scale: float) -> None:
    keys = draw.normal(1300, 8) * scale
    queries = torch.tensor([1e-30, 1e-20, 1e10, 1e20, 1e25, 3e38])[:, None] * torch.ones(8)
    sure = nearest(keys, queries, 3)[2]
    assert not sure[5]
    check(keys, queries, ExactIndex(keys).search(queries, 3), 3)


@pytest.mark.parametrize(("rows", "k", "few"), [(40, 30, 0), (700, 3, 0), (700, 3, 2**23)])
def test_a_query_that_is_not_finite_is_never_sure(rows: int, k: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_FEW", few)
    keys, queries = draw.normal(rows, 4), torch.zeros(4, 4)
    queries[:3, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    distances, positions, sure = nearest(keys, queries, k)
    assert sure.tolist() == [False, False, False, True]
    assert all(len(set(row)) == k for row in positions.tolist())
    check(keys, queries[3:], (distances[3:], positions[3:]), k)
    with pytest.raises(InputError, match="queries has NaN or infinite entries in rows 0, 1"):
        ExactIndex(keys).search(queries, k)


@pytest.mark.parametrize(("rows", "group"), [(300, 1), (1300, 4)])
def test_groups_of_few_keys_are_small(rows: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_LEAST_GROUPS", 300)
    for data in ("normal", "every key twice", "1e-30 to 1e30"):
        keys = DATA[data](draw, rows, 12)
        queries = torch.cat([keys[:1], DATA[data](draw, rows + 2, 12)[rows:]])
        index = Groups(keys, half_copy=True)
        assert index._group == group
        check(keys, queries, ExactIndex(keys).search(queries, 20), 20)
    assert index._near_groups(queries, 36)[0].shape == (3, 36)
    # Infinity times 0 is NaN, which a GPU takes for a large minimum: the nearest of these keys would be passed over.
    numbers = kernels.round_queries(queries, index._center, index._scale, index._typical, index._width)[1]
    assert torch.isfinite(numbers).all()


@pytest.mark.parametrize("kind", ["normal", "equal", "infinite", "NaN", "negative"])
@pytest.mark.parametrize(("n", "count"), [(7, 7), (300, 20), (1300, 20), (1100, 300)])
def test_the_smallest_of_each_row(kind: str, n: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "_PIECE", 256)
    values = draw.normal(2, n).abs()
    if kind == "equal":
        values = (values * 2).round()
    if kind in ("infinite", "NaN"):
        values[:, n // 200 :] = float(kind[:3])
    values = draw.normal(2, n).half() if kind == "negative" else values
    found, columns = selecting.smallest(values, count)
    wanted = values.sort(dim=1).values[:, :count]  # NaN last
    assert torch.equal(found.sort(dim=1).values.nan_to_num(-1), wanted.nan_to_num(-1))
    assert torch.equal(values.gather(1, columns).nan_to_num(-1), found.nan_to_num(-1))
    assert all(len(set(row)) == count for row in columns.tolist())


def test_few_keys_are_all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_GROUPS", 4)
    monkeypatch.setattr(kernels, "group_minima", None)
    for data in ("on a grid", "1e25", "1e-30 to 1e30"):
        keys = DATA[data](draw, 300, 5)
        queries = torch.cat([keys[:3], torch.full((1, 5), 1e20)])
        assert groups.is_worthwhile(queries, keys, 40)
        check(keys, queries, ExactIndex(keys).search(queries, 40), 40)


@pytest.mark.parametrize("few", [0, 2**23])
def test_of_equal_keys_the_first_are_found(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_FEW", few)
    keys = torch.randint(0, 3, (2500, 3), generator=torch.Generator().manual_seed(0)).float()
    found = ExactIndex(keys).search(keys[:4], 40)
    np.testing.assert_array_equal(found[1].numpy(), oracle.neighbors(keys.numpy(), None, keys[:4].numpy(), 40)[1])
    keys = draw.normal(800, 16).repeat_interleave(3, dim=0)
    distances, positions, sure = nearest(keys, keys[:5], 4)
    assert sure.all()
    assert torch.equal(positions[:, :3], torch.tensor([[0, 1, 2]] * 3 + [[3, 4, 5]] * 2))
    assert not distances[:, :3].any()


def test_results_do_not_depend_on_the_division_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = draw.normal(2600, 12), draw.normal(17, 12, seed=1)
    whole = Groups(keys, half_copy=True).nearest(queries, 6)
    monkeypatch.setattr(groups, "_ROUNDED", 2048 * 16)
    monkeypatch.setattr(groups, "_MINIMA_BYTES", 1)
    divided = Groups(keys, half_copy=False).nearest(queries, 6)
    monkeypatch.setattr(groups, "_FEW", 2**23)
    all_measured = Groups(keys, half_copy=True).nearest(queries, 6)
    assert whole.unsure is divided.unsure is all_measured.unsure is None
    for found in (divided, all_measured):
        assert torch.equal(whole.distances, found.distances)
        assert torch.equal(whole.positions, found.positions)


def test_the_smallest_and_the_largest() -> None:
    assert ExactIndex(torch.ones(1, 3)).search(torch.zeros(2, 3), 1)[1].tolist() == [[0], [0]]
    none = ExactIndex(draw.normal(2000, 3)).search(torch.empty(0, 3), 4)
    assert none[0].shape == none[1].shape == (0, 4)
    wide, queries = draw.normal(320, 4096), draw.normal(1, 4096, seed=1)
    check(wide, queries, ExactIndex(wide).search(queries, 3), 3)
    keys, queries = draw.normal(1500, 4), draw.normal(1, 4, seed=1)
    distances, positions, sure = nearest(keys, queries, 1000)  # among all groups
    assert sure.all()
    check(keys, queries, (distances, positions), 1000)
    million = torch.empty(10**6, 4)
    assert groups.is_worthwhile(torch.empty(10**5, 4), million, 2048)
    assert not groups.is_worthwhile(queries, million, 2049)
    assert not groups.is_worthwhile(torch.empty(10**6, 4), million[:1000], 100)
    assert not groups.is_worthwhile(queries, million.T, 1)


def test_a_gpu_with_less_shared_memory_than_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    multiply = kernels._multiply

    def refuse(*given: Any) -> None:
        tile = given[4]
        tried.append((tile.keys, tile.stages))
        if tile.keys * tile.stages > 150:
            raise kernels.OutOfResources(2**18, 2**17, "shared memory")
        multiply(*given)

    keys, queries = draw.normal(1500, 12), draw.normal(2, 12, seed=1)
    expected = Groups(keys, half_copy=True).nearest(queries, 3)
    monkeypatch.setattr(kernels, "_multiply", refuse)
    monkeypatch.setattr(kernels, "_fitting", {})
    for _ in range(2):
        found = Groups(keys, half_copy=True).nearest(queries, 3)
        assert torch.equal(found[1], expected[1])
    assert tried == [(256, 3), (256, 2), (256, 1), (128, 3), (128, 2), (128, 1), (128, 1)]


def test_a_device_is_tried_before_it_is_used() -> None:
    assert groups._works(torch.device("cpu"))


def test_the_users_contexts_change_nothing() -> None:
    keys, queries = draw.normal(2000, 24), draw.normal(3, 24, seed=1).requires_grad_()
    expected = ExactIndex(keys).search(queries.detach(), 5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        index = ExactIndex(keys)
        inside = index.search(queries, 5)
    after = index.search(queries, 5)
    for found in (inside, after):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert not found[0].requires_grad


def test_half_precision_that_suffices_for_few_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    find = Groups.nearest

    def counted(self: Groups, queries: Tensor, k: int) -> Nearest:
        counts.append(len(queries))
        return find(self, queries, k)

    monkeypatch.setattr(Groups, "nearest", counted)
    monkeypatch.setattr(exact, "_TRIED", 3)
    index = ExactIndex(torch.full((1200, 2), 0.3))
    for _ in range(2):
        assert index.search(torch.zeros(4, 2), 2)[1].tolist() == [[0, 1]] * 4
    assert counts == [4]


def test_the_copy_is_counted() -> None:
    for width, dtype, half_copy, copied in (
        (16, torch.float32, True, 2500 * 32),
        (17, torch.float16, True, 2500 * 48),
        (16, torch.float32, False, 0),
        (16, torch.float16, True, 0),
    ):
        index = ExactIndex(draw.normal(2500, width).to(dtype), half_copy)
        assert index.nbytes == 0
        index.search(draw.normal(2, width), 1)
        rest = index.nbytes - copied
        assert 2500 * 4.25 <= rest <= 2560 * 4.25
        assert math.isclose(groups.kept_bytes(2500, width, dtype, half_copy) - copied, 2500 * 4.25, abs_tol=1)
