"""What the ranks of one job tell each other: that one of them failed, and small tensors. No collective per batch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_resmem.errors import InputError, MemoryPassError, ResMemWarning
from lightning_resmem.model.placing import device_of

# How often a rank looks whether another one has failed, in seconds.
_POLL_SECONDS = 1.0
_attempts = count()
# Each job's group on the CPU: making one costs time and sockets, so it is made once.
_cpu_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which a process may hold only a part of the weights.

    Raises:
        InputError: Naming the way out.
    """
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise InputError(
            f"ResMem does not support {type(strategy).__name__}: a rank may hold only a part of the weights. Train "
            'without ResMemCallback, then memorize on one device or with strategy="ddp": '
            "memorize(L.Trainer(devices=1), model, dataloader)."
        )


class Ranks:
    """The processes of a trainer's job. Over one process everything here is immediate.

    Args:
        trainer: With its strategy set up.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
        group: Process group on the CPU, or None over one process.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.rank, self.size = trainer.global_rank, trainer.world_size
        self.group: dist.ProcessGroup | None = None
        if self.size > 1 and dist.is_initialized():
            # What the user set, `DDPStrategy(timeout=...)`, has no public name.
            self.group = _cpu_group(getattr(trainer.strategy, "_timeout", None))

    @contextmanager
    def together(self, doing: str) -> Iterator[Callable[[], None]]:
        """Run a block that fails on all ranks if it fails on one.

        Yields `check()`, to be called now and then by whoever is at work for long: it raises soon after another rank
        has failed. At the end of the block the ranks vote once.

        Args:
            doing: What the block does, for the message: "collecting rows".

        Raises:
            MemoryPassError: On the ranks that did not fail, with the text of the first error.
        """
        if self.group is None:
            yield lambda: None
            return
        # torch has no public name for the key-value store that its process groups rendezvous with.
        store = dist.PrefixStore("lightning_resmem", dist.distributed_c10d._get_default_store())
        key = f"failed/{next(_attempts)}"
        last_look = time.monotonic()

        def check() -> None:
            nonlocal last_look
            if time.monotonic() - last_look > _POLL_SECONDS:
                last_look = time.monotonic()
                try:
                    failed = store.check([key])
                except RuntimeError as error:  # rank zero, which keeps the store, is gone
                    raise _OtherRankFailed from error
                if failed:
                    raise _OtherRankFailed

        own: Exception | None = None
        try:
            yield check
        except Exception as error:
            own = error
            if not isinstance(error, _OtherRankFailed):
                with suppress(RuntimeError):  # without rank zero there is no store, and the vote will tell
                    store.set(key, "failed")
        text = None if own is None or isinstance(own, _OtherRankFailed) else f"{type(own).__name__}: {own}"
        if isinstance(own, _Voted):
            raise own.verdict
        try:
            failures = self._all_gather(_Vote(text), doing)
        except MemoryPassError as lost:
            raise lost from own
        if own is not None and not isinstance(own, _OtherRankFailed):
            raise own
        _raise_first(failures, doing)

    def gather_objects(self, value: object, doing: str = "exchanging values") -> list[object]:
        """Every rank's (small, picklable) value, in the order of ranks."""
        if self.group is None:
            return [value]
        gathered = self._all_gather(value, doing)
        if any(isinstance(found, _Vote) for found in gathered):
            # Another rank has left the block that this one is still in, and votes already.
            try:
                _raise_first(gathered, doing)
            except MemoryPassError as verdict:
                raise _Voted(verdict) from None
        return gathered

    def _all_gather(self, value: object, doing: str) -> list[object]:
        gathered: list[object] = [None] * self.size
        with self._noticing_loss(doing):
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank zero: those of BatchNorm differ by rank after training.

        Where a rank has a buffer in another shape, or not at all, a warning names it.
        """
        if self.group is None:
            return
        doing = "sharing the buffers of rank 0"
        own = {name: buffer for name, buffer in model.named_buffers() if _can_travel(buffer)}
        described = {name: (buffer.dtype, tuple(buffer.shape)) for name, buffer in own.items()}
        ranks = [held for held in self.gather_objects(described, doing) if isinstance(held, dict)]
        with self._noticing_loss(doing):
            for name, (dtype, shape) in ranks[0].items():
                value = torch.empty(shape, dtype=dtype)
                if not self.rank:
                    value.copy_(own[name].detach())
                # As bytes on the CPU: not every dtype and device can be sent.
                dist.broadcast(value.view(-1).view(torch.uint8), src=0, group=self.group)
                if self.rank:
                    _set_buffer(model, name, own.get(name), value)
        differing = sorted({name for held in ranks for name, _ in held.items() ^ ranks[0].items()})
        if differing:
            rank_zero_warn(
                f"The buffers {', '.join(differing)} differ by rank in shape or dtype, or some ranks lack them: for "
                "the memory pass all ranks have those of rank 0 now.",
                category=ResMemWarning,
            )

    def gather(self, rows: Tensor) -> Tensor:
        """The rows `(n, ...)` of all ranks, one after the other, on the device of this rank's rows."""
        if self.group is None:
            return rows
        gathered = self.gather_objects(rows.detach().cpu())
        return torch.cat([part for part in gathered if isinstance(part, Tensor)]).to(rows.device)

    @contextmanager
    def _noticing_loss(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise MemoryPassError(
                f"A rank was lost while {doing} (rank {self.rank} of {self.size} noticed): {error}"
            ) from error


def _can_travel(buffer: Tensor) -> bool:
    return not is_lazy(buffer) and buffer.layout == torch.strided and not buffer.is_quantized


def _set_buffer(model: nn.Module, name: str, buffer: Tensor | None, value: Tensor) -> None:
    """Give a buffer a value, in place if it has its shape."""
    if buffer is not None and (buffer.dtype, buffer.shape) == (value.dtype, value.shape):
        with suppress(RuntimeError):  # an expanded one cannot be written to
            buffer.detach().copy_(value)
            return
    path, _, leaf = name.rpartition(".")
    with suppress(AttributeError, KeyError):  # this rank has no such module, or something else of this name
        owner = model.get_submodule(path)
        value = value.to(device_of(model) if buffer is None else buffer.device)
        if leaf in dict(owner.named_buffers(recurse=False)) or getattr(owner, leaf, value) is None:
            setattr(owner, leaf, value)
        else:
            owner.register_buffer(leaf, value)


class _Vote(NamedTuple):
    """How a block ended on a rank: with this error, or well."""

    failure: str | None


class _Voted(Exception):
    """The vote is over, with this verdict: no rank takes part in another one."""

    def __init__(self, verdict: MemoryPassError) -> None:
        super().__init__(verdict)
        self.verdict = verdict


def _raise_first(gathered: list[object], doing: str) -> None:
    for rank, found in enumerate(gathered):
        if isinstance(found, _Vote) and found.failure is not None:
            raise MemoryPassError(f"Rank {rank} failed while {doing}, so all ranks stop. {found.failure}")


class _OtherRankFailed(Exception):
    """Another rank failed; its error is told in the vote."""


def _cpu_group(timeout: timedelta | None) -> dist.ProcessGroup:
    """The job's process group on the CPU: rows and errors travel there, GPU memory belongs to the model."""
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() == "gloo":
        return world
    if world not in _cpu_groups:
        _cpu_groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return _cpu_groups[world]
