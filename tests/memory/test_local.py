"""What LocalMemory refuses, and that a refused chunk leaves nothing behind."""

import re

import numpy as np
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
    with pytest.raises(InputError, match="queries has NaN or infinite"):
        memory.search(torch.full((1, 2), 1e300, dtype=torch.float64), 1)
    with pytest.raises(InputError, match="embeddings has NaN or infinite"):
        memory.add(torch.full((1, 2), 1e300, dtype=torch.float64), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"embeddings has shape \(2,\), .*batch dimension is missing"):
        memory.add(torch.zeros(2), torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    for ask in (lambda rows: memory.search(rows, 1), lambda rows: memory.predict(rows, torch.zeros(1, 3))):
        with pytest.raises(
            InputError, match=r"queries has shape \(2,\), .* batch dimension is missing.*queries\[None\]"
        ):
            ask(torch.zeros(2))
        for rows in (torch.zeros(1, 2, dtype=torch.complex64), np.zeros((1, 2), np.complex64), [[1j, 0]]):
            with pytest.raises(InputError, match=r"queries has dtype torch.complex64"):
                ask(rows)


@pytest.mark.parametrize("k", ["5", None, 2.5, float("nan"), True, np.float64(2), torch.tensor([1, 2])])
def test_k_that_is_no_number_of_neighbours(k: object) -> None:
    with pytest.raises(InputError, match=r"^k=.*whole number of at least 1"):
        _memory().search(torch.zeros(2, 2), k)


def test_k_beyond_the_rows_is_padded_within_reason() -> None:
    memory = _memory()
    assert memory.search(torch.zeros(2, 2), np.int64(5)).ids.shape == (2, 5)
    with pytest.raises(InputError, match=r"k=1000000000 for 2 queries takes 22.4 GiB, .* only 3 rows"):
        memory.search(torch.zeros(2, 2), 10**9)


def test_bad_outputs_of_queries() -> None:
    outputs = torch.zeros(2, 4)
    outputs[1, 2] = torch.nan
    with pytest.raises(InputError, match="outputs has NaN or infinite entries in rows 1"):
        _memory().predict(torch.zeros(2, 2), outputs)
    with pytest.raises(InputError, match="outputs has shape"):
        _memory().predict(torch.tensor(1.0), torch.zeros(2, 4))


@pytest.mark.parametrize("kind", [np.asarray, lambda rows: np.asarray(rows)[::-1][::-1], lambda rows: rows])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_and_lists_work_like_tensors(kind: object, dtype: torch.dtype) -> None:
    keys, outputs = torch.randn(6, 2).to(dtype), torch.randn(6, 4).to(dtype)
    targets, queries = torch.tensor([0, 1, 2, 3, 0, 1]), torch.randn(3, 2)
    memories = LocalMemory(params=ResMemParams(k=2)), LocalMemory(params=ResMemParams(k=2))
    answers = []
    for memory, given in zip(memories, (lambda rows: rows, lambda rows: kind(rows.tolist())), strict=True):
        memory.add(given(keys), given(outputs), given(targets), given(torch.arange(6) * 3))
        memory.remove(given(torch.tensor([3, 9])))
        memory.update(given(torch.tensor([0, 15])), given(keys[:2] + 1), given(outputs[:2] - 1), given(targets[2:4]))
        assert memory.fetch(given(torch.tensor([6]))).targets.tolist() == [2]
        answers.append(memory.predictions(given(queries), given(outputs[:3])))
        assert memory.search(given(queries), 1).ids.shape == (3, 1)
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, check_dtype=False)


def test_arrays_that_may_not_be_written_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    keys = np.zeros((3, 2), np.float32)
    keys.flags.writeable = False
    LocalMemory().add(keys, ROWS["outputs"], ROWS["targets"])
    assert not recwarn.list


@pytest.mark.parametrize("bad", [None, "abc", [[1.0], [1.0, 2.0]], {1: 2}, [["a"]], object()])
def test_what_cannot_be_made_a_tensor_is_named(bad: object) -> None:
    memory = _memory()
    for name in ROWS:
        with pytest.raises(InputError, match=f"^{name} of type"):
            memory.add(**{**ROWS, name: bad})
        if bad is not None:
            with pytest.raises(InputError, match=f"^{name} of type"):
                memory.update([5, 7, 9], **{name: bad})
    for ask in (lambda: memory.predict(bad, torch.zeros(1, 4)), lambda: memory.search(bad, 1)):
        with pytest.raises(InputError, match=r"^queries of type"):
            ask()
    with pytest.raises(InputError, match=r"^outputs of type"):
        memory.predict(torch.zeros(1, 2), bad)
    assert len(memory) == 3


@pytest.mark.parametrize("edit", ["remove", "update", "fetch"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([True, False, True]), r"dtype torch.bool.*memory.ids\[mask\]"),
        (torch.tensor([5.0]), "dtype torch.float32"),
        (torch.tensor([[5, 7]]), r"shape \(1, 2\)"),
        (torch.tensor(5), r"shape \(\)"),
        (5, r"shape \(\)"),
        (None, "of type NoneType"),
        ("5", "of type str"),
    ],
)
def test_ids_that_are_no_ids(edit: str, ids: object, message: str) -> None:
    memory = _memory()
    with pytest.raises(InputError, match=f"^ids .*{message}"):
        getattr(memory, edit)(ids)
    assert memory.ids.tolist() == [5, 7, 9]


def test_removing_nothing() -> None:
    memory = _memory()
    memory.remove([])
    assert len(memory) == 3
    LocalMemory().remove(torch.empty(0, dtype=torch.int64))


def test_repr_shows_what_is_held_and_builds_nothing() -> None:
    assert repr(LocalMemory()) == "LocalMemory(empty, index='auto', values='auto')"
    memory = _memory()
    assert repr(memory) == "LocalMemory(3 rows x 2, 4 outputs, index='auto', values='dense')"
    assert memory._rows.index is None
    memory.build()
    assert repr(memory) == "LocalMemory(3 rows x 2, 4 outputs, index='exact', values='dense')"
    assert repr(LocalMemory(index="HNSW8", values="sparse")) == "LocalMemory(empty, index='HNSW8', values='sparse')"


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


@pytest.mark.parametrize("ids", [[2, 3, 9], [2, 3, 10**12], [0, 1, 2], [0]])
def test_rows_are_found_by_id_however_ids_are_spread(ids: list[int]) -> None:
    memory, rows = LocalMemory(), {name: tensor[: len(ids)] for name, tensor in ROWS.items()}
    memory.add(**rows, ids=torch.tensor(ids))
    asked = torch.tensor([[ids[-1], -1, ids[-1] + 1, ids[0], 10**15, 7]])
    memory.build()
    for gone in (None, ids[-1]):
        if gone is not None and len(ids) > 1:
            memory.remove([gone])
            memory.add(**{name: tensor[:1] for name, tensor in rows.items()}, ids=torch.tensor([7]))
            memory.build()
        known = memory.ids.tolist()
        expected = torch.tensor([[float(i in known) for i in asked[0].tolist()]])
        labels = [memory.weighted_sums(asked[:, i : i + 1], torch.ones(1, 1), 1.0)[1].sum() for i in range(6)]
        assert torch.equal(torch.stack(labels)[None], expected)


def test_repeated_ids_can_be_removed_before_the_memory_is_built() -> None:
    memory = _memory()
    memory.add(**ROWS, ids=torch.tensor([1, 7, 20]))
    with pytest.raises(InputError, match="ids are repeated: 7"):
        memory.build()
    with pytest.raises(InputError, match=r"ids \[3\] are not in the memory"):
        memory.remove([7, 3])
    assert len(memory) == 6
    memory.remove([7])  # both rows
    assert memory.ids.tolist() == [1, 5, 9, 20]
    assert torch.equal(memory.fetch([20]).targets, torch.tensor([3]))
    memory.add(torch.ones(1, 2), torch.ones(1, 4), torch.tensor([2]), torch.tensor([7]))
    assert memory.search(torch.ones(1, 2), 1).ids.tolist() == [[7]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"embeddings": torch.zeros(3, 2, device="meta")}, "embeddings is a tensor on the meta device"),
        ({"outputs": torch.zeros(3, 4).to_sparse()}, "outputs is a sparse tensor, expected one with all its numbers"),
        (
            {"embeddings": torch.nested.nested_tensor([torch.zeros(2)] * 3, layout=torch.jagged)},
            "embeddings is a nested tensor",
        ),
        ({"targets": torch.zeros(3, dtype=torch.int64).to_sparse()}, "targets is a sparse tensor"),
        ({"targets": torch.zeros(3, dtype=torch.int64, device="meta")}, "targets is a tensor on the meta device"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "ids is a tensor on the meta device"),
        ({"ids": torch.tensor([2**64 - 1, 1, 2], dtype=torch.uint64)}, "ids holds numbers above 9223372036854775807"),
        ({"ids": [2**63, 1, 2]}, "ids of type list cannot be made a tensor"),
    ],
)
def test_tensors_that_hold_no_plain_numbers(bad: dict, message: str) -> None:
    memory = _memory()
    with pytest.raises(InputError, match=re.escape(message)):
        memory.add(**{**ROWS, "ids": torch.tensor([10, 11, 12]), **bad})
    assert memory.ids.tolist() == [5, 7, 9]
    if "embeddings" in bad:
        with pytest.raises(InputError, match=re.escape(message.replace("embeddings", "queries"))):
            memory.search(bad["embeddings"], 1)
    if "ids" in bad:
        for ask in (memory.fetch, memory.remove, memory.update):
            with pytest.raises(InputError, match=re.escape(message)):
                ask(bad["ids"])


def test_the_largest_ids() -> None:
    largest = 2**63 - 1
    memory = LocalMemory(params=ResMemParams(k=2))
    memory.add(**ROWS, ids=torch.tensor([largest - 1, 3, largest]))
    assert memory.ids.tolist() == [3, largest - 1, largest]
    assert memory.fetch([largest]).targets.tolist() == [3]
    assert sorted(memory.search(torch.zeros(1, 2), 3).ids[0].tolist()) == [3, largest - 1, largest]
    with pytest.raises(InputError, match=f"behind the largest so far, {largest}, there are no 3 more: give ids="):
        memory.add(**ROWS)
    with pytest.raises(InputError, match=r"ids \[4\] are not in the memory"):
        memory.fetch([4])
    memory.add(**ROWS, ids=torch.tensor([0, 1, 2]))
    memory.remove([largest])
    assert memory.ids.tolist() == [0, 1, 2, 3, largest - 1]
