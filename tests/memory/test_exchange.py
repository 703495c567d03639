"""All rows on every rank: what arrives, in which order, and how much memory it takes on the way."""

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_resmem import LocalMemory
from lightning_resmem.errors import InputError
from lightning_resmem.memory import exchange
from lightning_resmem.memory.exchange import all_gather_rows
from tests.ddp_processes import run_ranks

ROWS, MIB = 101, 2**20


def table(rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of many dtypes, with ids that have gaps."""
    ids = torch.arange(rows) * 7
    return {
        "ids": ids,
        "keys": torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)),
        "half": (ids[:, None] / 8).half(),
        "bfloat": (ids[:, None] / 8).bfloat16(),
        "flags": torch.stack([ids % 2 == 0, ids % 3 == 0], dim=1),
        "images": ids[:, None, None].expand(rows, 2, 3).to(torch.int32),
        "nothing": torch.zeros(rows, 0),
    }


def part(rows: dict[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    return {name: tensor[positions] for name, tensor in rows.items()}


def gathered_by(world_size: int) -> dict[str, dict[str, Tensor] | str | None]:
    """What the first ranks of the job get for rows that are spread over them in several ways."""
    group = dist.new_group(list(range(world_size)))
    rank, rows = dist.get_rank(), table()
    if rank >= world_size:
        return {}
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    uneven = shuffled.tensor_split([3, 50, 60][: world_size - 1])[rank]
    found: dict[str, Any] = {
        "strided": all_gather_rows(part(rows, torch.arange(ROWS)[rank::world_size]), group),
        "uneven": all_gather_rows(part(rows, uneven), group),
        "one rank": all_gather_rows(rows.copy() if rank == world_size - 1 else {}, group),
        "no rank": all_gather_rows({}, group),
        "few": all_gather_rows(part(rows, torch.arange(2)[rank::world_size]) if rank < 2 else {}, group),
    }
    repeated = part(rows, torch.arange(ROWS)[rank::world_size])
    if rank == world_size - 1:
        repeated = {name: torch.cat([tensor, rows[name][:1]]) for name, tensor in repeated.items()}
    wider = part(rows, torch.arange(ROWS)[rank::world_size])
    if rank == world_size - 1:
        wider["keys"] = torch.zeros(len(wider["ids"]), 6)
    for name, own in (("repeated", repeated), ("wider", wider)):
        try:
            all_gather_rows(own, group)
            found[name] = None
        except InputError as error:
            found[name] = str(error)
    found["again"] = all_gather_rows(part(rows, torch.arange(ROWS)[rank::world_size]), group)
    return found


def gather_in_worlds(rank: int) -> list[dict[str, Any]]:
    exchange._CHUNK_BYTES = 64  # many chunks of a few rows, and of a single row where one is larger
    return [gathered_by(world_size) for world_size in (1, 2, 3, 4)]


@pytest.mark.slow
def test_rows_are_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    by_rank, wanted = run_ranks(gather_in_worlds, 4, tmp_path), table()
    for rank in range(4):
        for world_size in range(rank + 1, 5):
            found = by_rank[rank][world_size - 1]
            for name in ("strided", "uneven", "one rank", "again"):
                assert list(found[name]) == list(wanted)
                for column, tensor in wanted.items():
                    assert found[name][column].dtype == tensor.dtype
                    assert torch.equal(found[name][column], tensor), (name, column)
            assert found["no rank"] == {}
            assert found["few"]["ids"].tolist() == [0, 7]
            assert found["repeated"].startswith("ids are repeated on several ranks: 0. Every training row")
            if world_size > 1:
                assert "Ranks hold rows of different kinds: rank 0" in found["wider"]


class Peak:
    """Resident bytes of this process above those at the start, watched every millisecond."""

    def __enter__(self) -> "Peak":
        self._process, self._done = psutil.Process(), threading.Event()
        self.start = self.highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.highest = max(self.highest, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        return self.highest - self.start


def measure(rank: int, rows: int, width: int) -> dict[str, float]:
    """Peaks in MiB while a rank's rows arrive chunk by chunk, and while the ranks exchange them."""
    world_size = dist.get_world_size()
    torch.zeros(MIB).clone()
    dist.all_reduce(torch.zeros(MIB))  # what the libraries take once
    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.float16):
        memory = LocalMemory(key_dtype=dtype)
        own = range(rank, rows, world_size)
        with Peak() as peak:
            memory.reserve(len(own))
            for start in range(0, len(own), 500):
                ids = torch.tensor(own[start : start + 500])
                keys = torch.randn(len(ids), width)
                memory.add(keys, torch.zeros(len(ids), 2), torch.zeros(len(ids), dtype=torch.int64), ids)
        found[f"own {dtype}"] = len(own) * (width * dtype.itemsize + 2 * 4 + 8 + 8) / MIB
        found[f"adding {dtype}"] = peak.bytes / MIB
        with Peak() as peak:
            group = dist.group.WORLD
            assert group is not None
            memory.gather(group)
        found[f"gathering {dtype}"] = peak.bytes / MIB
        found[f"rows {dtype}"] = len(memory)
        del memory
    return found


@pytest.mark.slow
def test_the_exchange_needs_what_it_says(tmp_path: Path) -> None:
    """200,000 rows of 128 floats on two ranks: beyond the result a rank's own rows, two chunks, 24 bytes a row."""
    rows, width = 200_000, 128
    for found in run_ranks(measure, 2, tmp_path, rows, width):
        print(found)
        for dtype, own_ratio in (("torch.float32", 1.0), ("torch.float16", 0.5)):
            own, result = found[f"own {dtype}"], 2 * found[f"own {dtype}"]
            assert found[f"rows {dtype}"] == rows
            # The pass streams: nothing is kept beside the rows.
            assert found[f"adding {dtype}"] <= 1.3 * own
            # The rank's own rows were resident before, so what is added is the result, the chunks and the places.
            assert found[f"gathering {dtype}"] <= result + 2 * 16 + 24 * rows / MIB + 8
            assert own == pytest.approx(own_ratio * found["own torch.float32"], rel=0.06)
