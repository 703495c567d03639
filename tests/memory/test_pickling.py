"""Copies of a memory that has answered: by pickle, deepcopy, torch.save, and in processes that were spawned."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.memory.search.faiss_index import FaissIndex

WIDTH, CLASSES = 6, 3


def _by_torch(memory: LocalMemory) -> LocalMemory:
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda memory: pickle.loads(pickle.dumps(memory)), "deepcopy": copy.deepcopy, "torch": _by_torch}


def _memory(rows: int, index: object = "auto", values: str = "dense") -> LocalMemory:
    memory = LocalMemory(params=ResMemParams(k=5, sigma=0.5), index=index, values=values)
    memory.add(torch.randn(rows, WIDTH), torch.randn(rows, CLASSES), torch.randint(CLASSES, (rows,)))
    return memory


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    ("rows", "index", "values"),
    [
        (20_000, "auto", "dense"),
        (50, "exact", "sparse"),
        (500, FaissIndex("IVF8,Flat", min_recall=0.99), "dense"),
        (500, FaissIndex("HNSW8", ef_search=77), "dense"),
    ],
)
def test_a_copy_of_a_memory_that_has_answered(copied, rows, index, values) -> None:
    memory, queries, outputs = _memory(rows, index, values), torch.randn(300, WIDTH), torch.randn(300, CLASSES)
    wanted, stats = memory.predict(queries, outputs), memory.stats()
    other = copied(memory)
    assert other.is_built
    assert other.stats() == stats
    assert torch.equal(other.predict(queries, outputs), wanted)
    other.remove(other.ids[::2])
    other.add(torch.randn(2, WIDTH), torch.randn(2, CLASSES), torch.tensor([0, 1]))
    assert len(other) == rows // 2 + 2
    assert len(memory) == rows
    assert torch.equal(memory.predict(queries, outputs), wanted)


def test_a_copy_is_as_large_as_the_rows() -> None:
    memory = _memory(10)
    memory.predict(torch.randn(2, WIDTH), torch.randn(2, CLASSES))
    assert len(pickle.dumps(memory)) < 20_000


def test_a_copy_of_rows_that_are_not_built(tmp_path) -> None:
    memory = _memory(10)
    memory.add(torch.randn(2, WIDTH), torch.randn(2, CLASSES), torch.tensor([0, 1]), torch.tensor([200, 100]))
    other = pickle.loads(pickle.dumps(memory))
    assert not other.is_built
    assert torch.equal(other.ids, memory.ids)
    memory.save(tmp_path / "memory")
    mapped = pickle.loads(pickle.dumps(LocalMemory.load(tmp_path / "memory", mmap=True)))
    assert torch.equal(mapped.predict(torch.eye(WIDTH), torch.ones(WIDTH, CLASSES)), memory.predict(
        torch.eye(WIDTH), torch.ones(WIDTH, CLASSES)))  # fmt: skip


class _Answers(Dataset):
    def __init__(self, memories: list[LocalMemory], queries: torch.Tensor) -> None:
        self.memories, self.queries = memories, queries

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.stack([memory(self.queries[row : row + 1])[0] for memory in self.memories])


@pytest.mark.slow
def test_spawned_workers_of_a_loader() -> None:
    memories = [_memory(20_000, "exact"), _memory(500, FaissIndex("IVF8,Flat", nprobe=8))]
    queries = torch.randn(6, WIDTH)
    wanted = torch.stack([memory(queries) for memory in memories], dim=1)
    for memory in memories:
        memory(torch.randn(300, WIDTH))
    loader = DataLoader(_Answers(memories, queries), batch_size=3, num_workers=1, multiprocessing_context="spawn")
    torch.testing.assert_close(torch.cat(list(loader)), wanted)
