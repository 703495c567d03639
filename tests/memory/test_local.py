"""What LocalMemory refuses, and that a refused chunk leaves nothing behind."""

import re

import pytest
import torch

from lightning_resmem import EmptyMemoryError, InputError, LocalMemory, Regression, ResMemParams

ROWS = {"embeddings": torch.zeros(3, 2), "outputs": torch.zeros(3, 4), "targets": torch.tensor([0, 1, 3])}


def _memory() -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(k=2))
    memory.add(torch.randn(3, 2), torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.tensor([5, 7, 9]))
    return memory


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"embeddings": torch.zeros(3)}, "embeddings has shape (3,), expected (N, D)"),
        ({"embeddings": torch.zeros(3, 0)}, "embeddings has shape (3, 0)"),
        ({"outputs": torch.zeros(3, 4).long()}, "outputs has dtype torch.int64"),
        ({"outputs": torch.zeros(2, 4)}, "the number of rows must be the same"),
        ({"targets": torch.tensor(1)}, "the number of rows must be the same"),
        ({"embeddings": torch.zeros(3, 5)}, "widths 5 and 4, the memory holds rows of widths 2 and 4"),
        ({"embeddings": torch.tensor([[0, 0], [0, torch.nan], [0, 0]])}, "embeddings has NaN or infinite entries"),
        ({"outputs": torch.full((3, 4), torch.inf)}, "outputs has NaN or infinite entries"),
        ({"targets": torch.tensor([0, 1, 4])}, "targets holds 4"),
        ({"targets": torch.zeros(3)}, "targets has dtype torch.float32"),
        ({"ids": torch.tensor([1, 2])}, "ids has shape (2,)"),
        ({"ids": torch.tensor([1.0, 2.0, 3.0])}, "dtype torch.float32"),
        ({"ids": torch.tensor([1, -2, 3])}, "ids holds -2"),
        ({"ids": torch.tensor([11, 12, 11])}, "ids are repeated: 11."),
    ],
)
def test_bad_rows_leave_the_memory_as_it_was(built: bool, bad: dict, message: str) -> None:
    memory, queries = _memory(), torch.randn(2, 2)
    if built:
        memory.build()
    with pytest.raises(InputError, match=re.escape(message)):
        memory.add(**{**ROWS, **bad})
    memory.add(torch.randn(1, 2), torch.randn(1, 4), torch.tensor([0]), torch.tensor([1]))
    assert memory.ids.tolist() == [1, 5, 7, 9]
    assert memory(queries).shape == (2, 4)


def test_ids_repeated_across_chunks() -> None:
    memory = _memory()
    memory.build()
    with pytest.raises(InputError, match="ids are repeated: 7"):
        memory.add(**ROWS, ids=torch.tensor([1, 7, 20]))  # known at once, because the memory is built
    assert len(memory) == 3
    memory = _memory()
    memory.add(**ROWS, ids=torch.tensor([1, 7, 20]))
    with pytest.raises(InputError, match="ids are repeated: 7"):
        memory.build()


def test_keys_too_large_for_half_precision() -> None:
    memory = LocalMemory(key_dtype=torch.float16)
    with pytest.raises(InputError, match=r"key_dtype=torch.float16; use torch.bfloat16.*rows 1"):
        memory.add(torch.tensor([[1.0], [1e5], [1.0]]), ROWS["outputs"], ROWS["targets"])
    assert len(memory) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": ""}, "index=''"),
        ({"index": 3}, "index=3"),
        ({"values": "thin"}, "values='thin'"),
        ({"key_dtype": torch.int8}, "key_dtype=torch.int8"),
        ({"task": "multiclass"}, "task='multiclass' is not a Task"),
        ({"params": {"k": 3}}, "is not a ResMemParams"),
        ({"task": Regression(), "values": "sparse"}, "not Regression"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        LocalMemory(**arguments)


def test_bad_queries() -> None:
    memory = _memory()
    with pytest.raises(InputError, match=r"queries has shape \(2, 3\), expected \(B, 2\)"):
        memory.search(torch.zeros(2, 3), 1)
    with pytest.raises(InputError, match="k=0"):
        memory.search(torch.zeros(2, 2), 0)
    with pytest.raises(InputError, match="queries has NaN"):
        memory.search(torch.full((1, 2), torch.nan), 1)


def test_an_empty_memory_answers_nothing() -> None:
    memory = LocalMemory()
    for ask in (memory.build, lambda: memory.search(torch.zeros(1, 2), 1), lambda: memory.ids, lambda: memory.params):
        with pytest.raises(EmptyMemoryError):
            ask()


@pytest.mark.parametrize("edit", ["remove", "update", "fetch"])
def test_unknown_ids(edit: str) -> None:
    memory = _memory()
    arguments = {"targets": torch.tensor([0, 0])} if edit == "update" else {}
    with pytest.raises(InputError, match=r"ids \[6\] are not in the memory"):
        getattr(memory, edit)(torch.tensor([5, 6]), **arguments)
    assert memory.ids.tolist() == [5, 7, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": torch.tensor([0, 9])}, "targets holds 9"),
        ({"embeddings": torch.zeros(2, 3)}, "widths 3 and 4"),
        ({"outputs": torch.full((2, 4), torch.nan)}, "outputs has NaN"),
        ({"outputs": torch.zeros(1, 4)}, "number of rows"),
    ],
)
def test_bad_updates_change_nothing(arguments: dict, message: str) -> None:
    memory, queries = _memory(), torch.randn(2, 2)
    before = memory(queries)
    with pytest.raises(InputError, match=message):
        memory.update(torch.tensor([5, 9]), **arguments)
    assert torch.equal(memory(queries), before)
    with pytest.raises(InputError, match="repeated"):
        memory.update(torch.tensor([5, 5]), targets=torch.tensor([0, 1]))


def test_ids_continue_after_the_largest() -> None:
    memory = _memory()
    memory.add(**ROWS)
    assert memory.ids.tolist() == [5, 7, 9, 10, 11, 12]
