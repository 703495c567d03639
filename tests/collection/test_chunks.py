"""Rows on their way to a memory: small chunks are joined, large ones are handed on in parts."""

import pytest
import torch

from lightning_resmem.collection import chunks
from lightning_resmem.collection.chunks import Chunk, Labels, Waiting
from lightning_resmem.collection.parts import Part
from lightning_resmem.tasks import Multiclass

PART = Part([], lambda index, first, count: torch.arange(first, first + count), dataset="rows")


def chunk(first: int, rows: int) -> Chunk:
    ids = torch.arange(first, first + rows)
    return Chunk(torch.randn(rows, 2), torch.randn(rows, 30), ids % 30, ids, torch.empty(rows, 0))


def test_large_batches_are_handed_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 20 * 128)  # a row has 128 bytes
    monkeypatch.setattr(chunks, "_PART_BYTES", 40 * 128)
    given, taken = [chunk(0, 3), chunk(3, 4), chunk(7, 100), chunk(107, 5)], []
    given[2].outputs[30] = torch.nan
    wanted = Chunk(*(torch.cat(column) for column in zip(*given, strict=True)))
    waiting = Waiting(taken.append, Labels(Multiclass(), torch.nn.Linear(2, 30)))
    for rows in given:
        waiting.add(rows, PART)
    given[2].outputs.fill_(7.0)  # as a model does whose next output is where this one was
    waiting.flush(PART)
    assert [len(rows.ids) for rows in taken] == [7, 40, 40, 19, 5]
    kept = torch.arange(112) != 37
    for column, found in zip(wanted, zip(*taken, strict=True), strict=True):
        assert torch.equal(torch.cat(found), column[kept])
    assert dict(waiting.left_out) == {("outputs", "rows"): [37]}
