"""Ids of rows and where they are: by themselves, by search and by a table."""

import pytest
import torch

from lightning_resmem import InputError
from lightning_resmem.memory.row_ids import RowIds


def _held(*chunks: list[int]) -> RowIds:
    ids = RowIds()
    for chunk in chunks:
        ids.append(torch.tensor(chunk, dtype=torch.int64))
    return ids


@pytest.mark.parametrize(
    "known",
    [
        list(range(20)),  # the position is the id
        [1, 2, 3, 5, 8, 13, 21],  # a table
        [1, 1000, 1_000_000],  # too far apart for one
    ],
)
def test_positions_are_those_of_a_dictionary_however_often_they_are_asked_for(known: list[int]) -> None:
    ids, asked = _held(known), torch.tensor([[-1, 0, 1, 2], [3, 21, 1000, 10**12]])
    where = {id: position for position, id in enumerate(known)}
    for _ in range(3):
        found = ids.positions(asked)
        assert found.tolist() == [[where.get(id, -1) for id in row] for row in asked.tolist()]


def test_positions_follow_the_rows() -> None:
    ids = _held([2, 4, 9])
    for _ in range(3):
        assert ids.positions(torch.tensor([9, 4])).tolist() == [2, 1]
    ids.keep(torch.tensor([True, False, True]))
    for _ in range(3):
        assert ids.positions(torch.tensor([9, 4])).tolist() == [1, -1]
    ids.append(torch.tensor([11]))
    for _ in range(3):
        assert ids.positions(torch.tensor([11, 9])).tolist() == [2, 1]
    ids.replace(torch.tensor([4, 11]))
    for _ in range(3):
        assert ids.positions(torch.tensor([11, 9, 4])).tolist() == [1, -1, 0]


def test_only_what_came_out_of_order_is_sorted() -> None:
    assert _held([0, 3], [5, 6], []).sort() is None
    ids = _held([4, 6], [0, 5])
    assert ids.sort().tolist() == [2, 0, 3, 1]
    assert ids.finish().tolist() == [0, 4, 5, 6]
    assert ids.sort() is None
    assert ids.last == 6


def test_repeated_ids_are_listed_and_nothing_is_moved() -> None:
    ids = _held([4, 6], [0, 6])
    for _ in range(2):
        with pytest.raises(InputError, match="ids are repeated: 6"):
            ids.sort()
        assert ids.finish().tolist() == [4, 6, 0, 6]


def test_unknown_ids_are_listed() -> None:
    with pytest.raises(InputError, match=r"ids \[1, 7\] are not in the memory"):
        _held([2, 4]).known_positions(torch.tensor([1, 2, 7]))
