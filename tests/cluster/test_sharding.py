"""Splitting and merging against brute force, over splits, orders, ties and empty shards."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.cluster.sharding import assign, merge, shards_of, split

Found = tuple[torch.Tensor, torch.Tensor]


@given(
    ids=st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=50),
    num_shards=st.integers(1, 9),
)
def test_every_row_has_one_shard_whatever_it_comes_with(ids: list[int], num_shards: int) -> None:
    rows = torch.tensor(ids, dtype=torch.int64)
    parts = split(rows, num_shards)
    assert len(parts) == num_shards
    assert torch.cat(parts).sort().values.tolist() == list(range(len(ids)))
    assert all(bool((part[1:] > part[:-1]).all()) for part in parts)  # in their order
    for shard, part in enumerate(parts):
        assert (shards_of(rows[part], num_shards) == shard).all()
        if len(part):
            assert shards_of(rows[part[:1]], num_shards).tolist() == [shard]  # alone as together


@pytest.mark.parametrize("num_shards", [2, 3, 5, 8, 64])
@pytest.mark.parametrize("step", [1, 2, 7, 64, 1024])
def test_shards_are_even_for_any_pattern_of_ids(num_shards: int, step: int) -> None:
    rows = 500 * num_shards
    counts = shards_of(step * torch.arange(rows), num_shards).bincount(minlength=num_shards)
    assert counts.sum() == rows
    assert (counts - 500).abs().max() < 6 * 500**0.5


def brute_force(parts: list[Found], k: int) -> list[list[tuple[float, int]]]:
    merged = []
    for row in range(len(parts[0][0])):
        places = [
            (float(distance), int(index))
            for distances, ids in parts
            for distance, index in zip(distances[row], ids[row], strict=True)
        ]
        places.sort(key=lambda place: (place[0], place[1] < 0, place[1]))
        merged.append(places[:k])
    return merged


def as_lists(found: Found) -> list[list[tuple[float, int]]]:
    return [list(zip(d, i, strict=True)) for d, i in zip(found[0].tolist(), found[1].tolist(), strict=True)]


@st.composite
def shards(draw: st.DrawFn) -> list[Found]:
    """Answers of some shards for two queries: few different distances, so that many are equal; some places missing."""
    ids = iter(draw(st.permutations(range(40))))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        width = draw(st.integers(0, 5))
        columns = [next(ids) for _ in range(width)]
        distances, rows = [], []
        for _ in range(2):
            missing = draw(st.integers(0, width))
            near = sorted(draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])) for _ in range(width - missing))
            found = sorted(zip(near, columns, strict=False))
            distances.append([d for d, _ in found] + [np.inf] * missing)
            rows.append([i for _, i in found] + [-1] * missing)
        shape = (2, width)
        parts.append((torch.tensor(distances).view(shape), torch.tensor(rows, dtype=torch.int64).view(shape)))
    return parts


@given(parts=shards(), k=st.integers(1, 12))
def test_merging_is_brute_force_in_any_order_and_grouping(parts: list[Found], k: int) -> None:
    expected = brute_force(parts, k)
    assert as_lists(merge(parts, k)) == expected
    assert as_lists(merge(parts[::-1], k)) == expected
    left = parts[0]
    for part in parts[1:]:
        left = merge([left, part], k)
    assert as_lists(merge([left], k)) == expected
    right = parts[-1]
    for part in parts[-2::-1]:
        right = merge([part, right], k)
    assert as_lists(merge([right], k)) == expected
    nothing = torch.empty(2, 0), torch.empty(2, 0, dtype=torch.int64)
    for place in range(len(parts) + 1):
        assert as_lists(merge([*parts[:place], nothing, *parts[place:]], k)) == expected


def test_rows_infinitely_far_come_before_missing_places() -> None:
    beyond = torch.tensor([[torch.inf]])
    far, missing = (beyond, torch.tensor([[7]])), (beyond, torch.tensor([[-1]]))
    for parts in ([far, missing], [missing, far]):
        assert merge(parts, 2)[1].tolist() == [[7, -1]]


@given(
    rows=st.integers(1, 30),
    num_shards=st.integers(1, 5),
    k=st.integers(1, 35),
    seed=st.integers(0, 1000),
)
def test_shards_find_what_one_memory_finds(rows: int, num_shards: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(3, (rows, 2), generator=generator).float()  # a grid: many equal distances
    ids = torch.randperm(100, generator=generator)[:rows]
    queries = torch.randint(3, (4, 2), generator=generator).float()
    outputs, targets = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64)

    def found(positions: torch.Tensor) -> Found:
        memory = LocalMemory(params=ResMemParams())
        if not len(positions):
            return torch.empty(4, 0), torch.empty(4, 0, dtype=torch.int64)
        memory.add(keys[positions], outputs[positions], targets[positions], ids[positions])
        return tuple(memory.search(queries, min(k, len(positions))))

    expected = found(torch.arange(rows))
    merged = merge([found(part) for part in split(ids, num_shards)], k)
    assert torch.equal(merged[1], expected[1])
    assert torch.equal(merged[0], expected[0])


@given(nodes=st.lists(st.sampled_from("abcde"), min_size=1, max_size=8), replicas=st.integers(1, 3))
def test_copies_of_a_shard_are_apart_where_they_can_be(nodes: list[str], replicas: int) -> None:
    places = nodes * replicas
    num_shards = len(nodes)
    shards = assign(places, num_shards)
    assert sorted(shards) == sorted(list(range(num_shards)) * replicas)
    on = {node: [s for s, n in zip(shards, places, strict=True) if n == node] for node in set(places)}
    for shard_list in on.values():
        if len(shard_list) <= num_shards:
            assert len(set(shard_list)) == len(shard_list)


def test_two_replicas_on_two_nodes_are_never_together() -> None:
    for order in set(itertools.permutations("aaabbb")):
        shards = assign(order, 3)
        assert {s for s, n in zip(shards, order, strict=True) if n == "a"} == {0, 1, 2}
