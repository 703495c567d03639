"""Saved memories in other forms: the same rows, and two of one base as one that answers as one filled with both."""

from contextlib import ExitStack

import pytest
import torch

from lightning_resmem import (
    DenseConfig,
    InputError,
    LocalMemory,
    Regression,
    ResMemParams,
    SparseConfig,
    StaleMemoryError,
)
from lightning_resmem.memory.converting import Kept, converted
from lightning_resmem.memory.storage.saved import read_saved


def filled(ids=None, rows=30, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5), **options)
    keys, outputs = (torch.randn(rows, width, generator=generator) for width in (4, 6))
    memory.add(keys, outputs, torch.randint(6, (rows,), generator=generator), ids)
    memory.provenance = {"fingerprint": "f" * 64, "head": "head"}
    return memory


def convert(tmp_path, memories, kept=None, renumber=False):
    with ExitStack() as stack:
        places = [memory.save(tmp_path / str(number)) for number, memory in enumerate(memories)]
        saved = [stack.enter_context(read_saved(place, mmap=True)) for place in places]
        return converted(saved, kept or Kept(), renumber)


def rows_of(memory):
    return memory.stored(slice(None))


@pytest.mark.parametrize(
    "options",
    [{}, {"values": SparseConfig(2)}, {"key_dtype": torch.bfloat16, "values": DenseConfig(torch.float16)}],
    ids=["dense", "sparse", "half"],
)
def test_what_is_not_asked_for_stays_to_the_bit(tmp_path, options):
    memory = filled(**options)
    same = convert(tmp_path, [memory])
    before, after = rows_of(memory), rows_of(same)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert (same.params, same.provenance, same.tunable) == (memory.params, memory.provenance, memory.tunable)


def test_two_memories_answer_as_one_filled_with_both(tmp_path):
    even, odd = (filled(torch.arange(first, 60, 2), seed=first) for first in (0, 1))
    both = filled(torch.arange(0, 60, 2), seed=0)
    part = rows_of(odd)
    both.add(part["keys"], part["outputs"], part["targets"], part["ids"])
    merged, queries = convert(tmp_path, [even, odd]), torch.randn(8, 4)
    assert torch.equal(merged.ids, torch.arange(60))
    assert torch.equal(merged.search(queries, 5).ids, both.search(queries, 5).ids)
    assert torch.equal(merged(queries), both(queries))


def test_kinds_of_values_are_those_of_the_first(tmp_path):
    merged = convert(tmp_path, [filled(values=SparseConfig(3)), filled(seed=1)], renumber=True)
    assert merged.stats()["values"] == "sparse"
    assert torch.equal(merged.ids, torch.arange(60))


def other_weights():
    memory = filled(torch.arange(30, 60))
    memory.provenance["fingerprint"] = "e" * 64
    return memory


def narrower():
    memory = LocalMemory(params=ResMemParams(k=3))
    memory.add(torch.randn(3, 2), torch.randn(3, 6), torch.arange(3), torch.arange(30, 33))
    return memory


def regression():
    memory = LocalMemory(task=Regression(), params=ResMemParams(k=3))
    memory.add(torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 6), torch.arange(30, 33))
    return memory


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (filled, InputError, "30 ids are in more than one of the memories, 0 the first"),
        (other_weights, StaleMemoryError, "the fingerprint is f+ in the first, e+ in the second"),
        (narrower, InputError, "the width of the keys is 4 in the first, 2 in the second"),
        (regression, InputError, "the task is multiclass in the first, regression in the second"),
    ],
)
def test_memories_that_are_not_one_are_refused(tmp_path, other, error, message):
    with pytest.raises(error, match=message):
        convert(tmp_path, [filled(), other()])


@pytest.mark.parametrize("values", [None, SparseConfig(2)])
def test_numbers_that_a_type_cannot_hold_are_named(tmp_path, values):
    memory = filled()
    memory.update(torch.tensor([7]), embeddings=torch.full((1, 4), 1e6))
    with pytest.raises(InputError, match=r"float16.*7"):
        convert(tmp_path, [memory], Kept(values=values, key_dtype=torch.float16))


@pytest.mark.parametrize("keep", ["uniform", "residual"])
def test_of_several_memories_no_sample_is_told(tmp_path, keep):
    even, odd = (filled(torch.arange(first, 60, 2), seed=first) for first in (0, 1))
    even.provenance |= {"max_rows": "30", "keep": "uniform", "rows_seen": "100"}
    odd.provenance |= {"max_rows": "30", "keep": keep, "rows_seen": "200"}
    merged = convert(tmp_path, [even, odd])
    assert "max_rows" not in merged.stats()
    assert merged.provenance.get("keep") == (None if keep == "uniform" else keep)
    assert convert(tmp_path / "one", [odd]).stats()["rows_seen"] == 200
