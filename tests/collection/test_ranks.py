"""Ranks that tell each other what went wrong, as real processes."""

import os
import signal
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn

from lightning_resmem.collection.ranks import Ranks, check_strategy
from lightning_resmem.errors import InputError
from tests.ddp_processes import run_ranks


def ranks_of_group() -> Ranks:
    """All that `Ranks` asks of a trainer is which process this is, of how many."""
    trainer = SimpleNamespace(global_rank=dist.get_rank(), world_size=dist.get_world_size(), strategy=DDPStrategy())
    return Ranks(trainer)  # type: ignore[arg-type]


def failing_together(ranks: Ranks, error: Exception | None, busy_until_told: bool = False) -> tuple[str, str, float]:
    """Name and text of what a block raised, and how long it took."""
    started = time.monotonic()
    try:
        with ranks.together("counting sheep") as check:
            if error is not None:
                raise error
            while busy_until_told and time.monotonic() < started + 60:
                check()
                time.sleep(0.01)
    except Exception as raised:
        return type(raised).__name__, str(raised), time.monotonic() - started
    return "", "", time.monotonic() - started


class Buffers(nn.Module):
    """Buffers of the kinds that do not travel by themselves; their values differ by rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm.running_mean.fill_(rank)
        self.norm.num_batches_tracked.fill_(rank)
        self.register_buffer("f16", torch.full((2, 2), float(rank), dtype=torch.float16))
        self.register_buffer("bf16", torch.full((2,), float(rank), dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([rank == 0, rank != 0]))
        self.register_buffer("transposed", torch.full((3, 2), float(rank)).t())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("shadow", torch.full((1,), float(rank)), persistent=False)
        self.weight = nn.Parameter(torch.tensor([float(rank)]))


class UnevenBuffers(nn.Module):
    """Buffers that training does not mind: views, and what a rank has in another shape, or not at all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner = nn.Identity()
        values = torch.complex(torch.full((3,), float(rank)), torch.full((3,), 2.0 + rank))
        self.register_buffer("conjugate", values.conj())
        self.register_buffer("negative", values.imag if rank else torch.complex(values.real, -values.imag).conj().imag)
        self.register_buffer("expanded", torch.full((1,), float(rank)).expand(4))
        self.inner.register_buffer("queue", torch.arange(float(4 + rank)))
        self.register_buffer("lazy", torch.full((2,), 5.0) if rank == 0 else None)
        self.register_buffer("extra" if rank == 2 else "common", torch.tensor([float(rank)]))
        self.register_buffer("narrow", torch.ones(2, dtype=torch.float16 if rank else torch.float32))


def uneven_buffers(rank: int) -> dict[str, Any]:
    ranks, model = ranks_of_group(), UnevenBuffers(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks.share_buffers(model)
    held = {name: buffer.resolve_conj().resolve_neg().clone() for name, buffer in model.named_buffers()}
    return {"buffers": held, "warnings": [str(warning.message) for warning in caught]}


@pytest.mark.slow
def test_buffers_that_differ_by_rank(tmp_path: Path) -> None:
    found = run_ranks(uneven_buffers, 3, tmp_path)
    assert found[2]["buffers"].pop("extra").tolist() == [2.0]
    for rank in found:
        assert rank["buffers"]["conjugate"].tolist() == [-2j] * 3
        assert rank["buffers"]["negative"].tolist() == [2.0] * 3
        assert rank["buffers"]["expanded"].tolist() == [0.0] * 4
        assert rank["buffers"]["inner.queue"].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert rank["buffers"]["lazy"].tolist() == [5.0, 5.0]
        assert rank["buffers"]["common"].tolist() == [0.0]
        assert rank["buffers"]["narrow"].dtype == torch.float32
        assert len(rank["buffers"]) == 7
    (warned,) = found[0]["warnings"]
    assert "common, extra, inner.queue, lazy, narrow differ by rank" in warned


def everything_but_loss(rank: int) -> dict[str, Any]:
    ranks = ranks_of_group()
    model = Buffers(rank)
    ranks.share_buffers(model)
    found: dict[str, Any] = {
        "objects": ranks.gather_objects({"rank": rank}),
        "gathered": ranks.gather(torch.full((rank, 2), float(rank))),
        "buffers": dict(model.named_buffers()),
        "weight": model.weight.item(),
        "fine": failing_together(ranks, None),
        "one": failing_together(ranks, ValueError("no sheep") if rank == 1 else None),
        "two": failing_together(ranks, KeyError(f"sheep {rank}") if rank else None),
        "told": failing_together(ranks, OSError("the wolf") if rank == 2 else None, busy_until_told=True),
        "fine again": failing_together(ranks, None),
    }
    return found


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    found = run_ranks(everything_but_loss, 3, tmp_path)
    for rank, result in enumerate(found):
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["gathered"].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert result["weight"] == rank  # weights are left alone
        assert result["fine"][:2] == result["fine again"][:2] == ("", "")
        for name, buffer in result["buffers"].items():
            assert torch.equal(buffer, found[0]["buffers"][name]), name
    assert found[2]["buffers"]["mask"].tolist() == [True, False]
    assert found[2]["buffers"]["norm.num_batches_tracked"].item() == 0

    told = "Rank 1 failed while counting sheep, so all ranks stop. ValueError: no sheep"
    assert [result["one"][:2] for result in found] == [
        ("MemoryPassError", told),
        ("ValueError", "no sheep"),
        ("MemoryPassError", told),
    ]
    assert [result["two"][0] for result in found] == ["MemoryPassError", "KeyError", "KeyError"]
    assert "Rank 1 failed" in found[0]["two"][1]
    assert [result["told"][0] for result in found] == ["MemoryPassError", "MemoryPassError", "OSError"]
    for result in found:
        assert max(result[name][2] for name in ("one", "two", "told")) < 5.0


def lose_one(rank: int, lost: int) -> Any:
    ranks = ranks_of_group()
    ranks.gather_objects(rank)
    if rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return failing_together(ranks, None, busy_until_told=rank != 1 and lost == 0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
def test_a_killed_rank_is_noticed_by_the_others(tmp_path: Path, lost: int) -> None:
    found = run_ranks(lose_one, 3, tmp_path, lost)
    assert found.pop(lost) is None
    for kind, text, seconds in found:
        assert kind == "MemoryPassError"
        assert "A rank was lost while counting sheep" in text
        assert seconds < 15.0


def test_one_process_is_immediate() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    ranks = Ranks(trainer)
    assert (ranks.rank, ranks.size, ranks.group) == (0, 1, None)
    assert ranks.gather_objects("alone") == ["alone"]
    rows = torch.ones(2, 2)
    assert ranks.gather(rows) is rows
    ranks.share_buffers(nn.BatchNorm1d(2))
    with ranks.together("counting sheep") as check:
        check()
    with pytest.raises(KeyError, match="sheep"), ranks.together("counting sheep"):
        raise KeyError("sheep")


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_split_the_weights_are_refused(strategy: type) -> None:
    with pytest.raises(InputError, match=rf"does not support {strategy.__name__}.*memorize\(L.Trainer\(devices=1\)"):
        check_strategy(strategy())


def test_deepspeed_is_refused_though_it_is_a_ddp_strategy() -> None:
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # making one needs the deepspeed package
    with pytest.raises(InputError, match="does not support DeepSpeedStrategy"):
        check_strategy(strategy)


def test_ddp_and_one_device_are_accepted() -> None:
    check_strategy(DDPStrategy())
    check_strategy(SingleDeviceStrategy("cpu"))
