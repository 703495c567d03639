"""`add` and `update` change all that they are given, or nothing, whatever is raised in between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lightning_resmem import InputError, LocalMemory, Multilabel, Regression, ResMemParams
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.values.dense import DenseConfig

ROWS, WIDTH, CLASSES = 40, 3, 4
TASKS = {"dense": None, "sparse": None, "regression": Regression(), "multilabel": Multilabel()}


def _rows(kind: str, first: int, count: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(first)
    embeddings, outputs = torch.randn(2, count, CLASSES, generator=generator)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    if kind == "regression":
        targets = torch.randn(count, CLASSES, generator=generator)
    elif kind == "multilabel":
        targets = torch.rand(count, CLASSES, generator=generator).round()
    return embeddings[:, :WIDTH], outputs, targets, torch.arange(first, first + count)


def _memory(kind: str, *chunks: tuple[Tensor, ...]) -> LocalMemory:
    values = "sparse" if kind == "sparse" else "dense"
    memory = LocalMemory(TASKS[kind], ResMemParams(k=7, sigma=0.5), values=values)
    for chunk in chunks:
        memory.add(*chunk)
    return memory


@contextmanager
def _failing(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> Iterator[None]:
    """Let a later call of a method of GrowingTensor run out of memory, after it has done its work."""
    real, calls = getattr(GrowingTensor, method), []

    def fails(self: GrowingTensor, *given: object) -> object:
        done = real(self, *given)
        calls.append(1)
        if len(calls) > call:
            raise MemoryError("no room")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(GrowingTensor, method, fails)
        yield


def _alike(memory: LocalMemory, other: LocalMemory) -> None:
    queries, outputs = torch.randn(9, WIDTH), torch.randn(9, CLASSES)
    assert torch.equal(memory.ids, other.ids)
    torch.testing.assert_close(memory.predict(queries, outputs), other.predict(queries, outputs))
    for found, wanted in zip(
        memory.fetch(memory.ids).tensors().values(), other.fetch(other.ids).tensors().values(), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("is_first", [False, True])
def test_a_chunk_that_fails_can_be_repeated(
    kind: str, call: int, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = _rows(kind, 0), _rows(kind, 100)
    memory = _memory(kind) if is_first else _memory(kind, old)
    if call > 2 and not is_first:
        memory.build()
    with _failing(monkeypatch, "append", call):
        try:
            memory.add(*new)
        except MemoryError:
            failed = True
        else:
            failed = False
    assert len(memory) == (0 if is_first else ROWS) + (0 if failed else ROWS)
    if failed and not is_first:
        _alike(memory, _memory(kind, old))
    if failed:
        memory.add(*new)
    _alike(memory, _memory(kind, new) if is_first else _memory(kind, old, new))


def test_a_chunk_that_fails_in_a_block_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = _memory("dense", _rows("dense", 0))
    for _ in range(3):
        with _failing(monkeypatch, "append", 2), pytest.raises(MemoryError):
            memory.add(*_rows("dense", 500))
    assert memory.last_id == ROWS - 1
    memory.add(*_rows("dense", 100)[:3])
    _alike(memory, _memory("dense", _rows("dense", 0), (*_rows("dense", 100)[:3], torch.arange(ROWS, 2 * ROWS))))


@pytest.mark.parametrize("kind", TASKS)
def test_an_update_that_fails_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = _rows(kind, 0), _rows(kind, 100, 5)
    memory, queries, outputs = _memory(kind, old), torch.randn(9, WIDTH), torch.randn(9, CLASSES)
    memory.predict(queries, outputs)  # residuals are derived
    real, writes = torch.Tensor.__setitem__, []

    for failing in range(len(memory.fetch(memory.ids).tensors()) + 1):
        writes.clear()

        def fails(self: Tensor, key: object, value: object) -> None:
            real(self, key, value)
            writes.append(1)
            if len(writes) == failing + 1:  # noqa: B023
                raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "__setitem__", fails)
            with pytest.raises(MemoryError):
                memory.update(torch.arange(5), *new[:3])
        _alike(memory, _memory(kind, old))
    memory.update(torch.arange(5), *new[:3])
    changed = [torch.cat([part[:5], rest[5:]]) for part, rest in zip(new[:3], old[:3], strict=True)]
    _alike(memory, _memory(kind, (*changed, old[3])))


def test_targets_of_another_precision() -> None:
    old = _rows("regression", 0)
    memory, queries, outputs = _memory("regression", old), torch.randn(9, WIDTH), torch.randn(9, CLASSES)
    memory.predict(queries, outputs)
    targets = old[2].double().numpy() + 1
    memory.update(torch.arange(ROWS), outputs=old[1] * 2, targets=targets)
    _alike(memory, _memory("regression", (old[0], old[1] * 2, old[2] + 1, old[3])))


_LARGE = torch.full((2, CLASSES), 1e6)


@pytest.mark.parametrize(
    ("values", "first", "outputs", "message"),
    [
        (DenseConfig(torch.float16), torch.float32, _LARGE, "as torch.float16, at most 65504"),
        ("dense", torch.float16, _LARGE, "as torch.float16, at most 65504"),
        ("dense", torch.float32, _LARGE.double() * 1e300, r"as torch.float32, at most 3.4028e\+38"),
        ("sparse", torch.float32, _LARGE.double() * 1e300, r"as torch.float32, at most 3.4028e\+38"),
        (DenseConfig(torch.bfloat16), torch.float32, torch.full((2, CLASSES), 3.4028e38), "as torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("way", ["add", "update"])
def test_what_the_stored_precision_cannot_hold(
    values: object, first: torch.dtype, outputs: Tensor, message: str, way: str
) -> None:
    memory = LocalMemory(params=ResMemParams(k=2), values=values)
    memory.add(torch.eye(2), torch.ones(2, CLASSES, dtype=first), torch.tensor([0, 1]))
    before = memory.predict(torch.eye(2), torch.ones(2, CLASSES))
    change: dict[str, Callable[[], None]] = {
        "add": lambda: memory.add(torch.eye(2), outputs, torch.tensor([0, 1])),
        "update": lambda: memory.update(torch.arange(2), -torch.eye(2), outputs, torch.tensor([1, 0])),
    }
    with pytest.raises(InputError, match=message):
        change[way]()
    assert len(memory) == 2
    assert torch.equal(memory.predict(torch.eye(2), torch.ones(2, CLASSES)), before)


def test_targets_that_the_stored_precision_cannot_hold() -> None:
    memory = LocalMemory(Regression(), ResMemParams(k=2))
    memory.add(torch.eye(2), torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(InputError, match=r"targets \(as torch.float32.*rows 3"):
        memory.add(torch.eye(2), torch.ones(2, 1), torch.tensor([[1.0], [1e300]], dtype=torch.float64))
    with pytest.raises(InputError, match=r"targets \(as torch.float32.*rows 0"):
        memory.update([0], outputs=torch.zeros(1, 1), targets=torch.tensor([[1e300]], dtype=torch.float64))
    assert memory.fetch([0]).outputs.tolist() == [[1]]


def test_keys_too_large_for_bfloat16() -> None:
    memory = LocalMemory(key_dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"key_dtype=torch.bfloat16; use torch.float32"):
        memory.add(torch.full((1, WIDTH), 3.4028e38), torch.ones(1, 2), torch.tensor([0]))


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("edit", ["remove", "remove all", "update"])
def test_rows_that_are_put_back_are_as_they_were(kind: str, edit: str) -> None:
    memory = _memory(kind, _rows(kind, 40), _rows(kind, 0))
    memory.build()
    before, last = {name: rows.clone() for name, rows in memory.stored(slice(None)).items()}, memory.last_id
    ids = torch.arange(80) if edit == "remove all" else torch.tensor([70, 3, 70, 12])
    rows = memory.stored_of(ids)
    if edit == "update":
        embeddings, outputs, targets, _ = _rows(kind, 99, 3)
        memory.update(ids.unique(), embeddings, outputs, targets)
    else:
        memory.remove(ids)
    memory.put_back(rows)
    assert memory.last_id == last
    after = memory.stored(slice(None))
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(InputError, match="not in the memory"):
        memory.stored_of(torch.tensor([3, 200]))
