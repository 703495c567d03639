"""Does a memory fit? What it will take, against what this machine has free."""

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from lightning_resmem.errors import ResMemWarning

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still take on a device; None where it cannot be told."""
    if device.type == "cpu":
        return available_bytes()
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch for what comes
    return torch.cuda.mem_get_info(device)[0] + unused


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Main memory that this process may still take, within its container's limit; None where it cannot be told."""
    free = []
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        try:
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            return None
    with suppress(OSError, ValueError):  # no such file, or "max": the container has no limit
        free.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return min(free)


def check_capacity(needed: dict[str, int], available: int | None, copies: int = 1) -> str:
    """Warn if a memory does not fit.

    Args:
        needed: Bytes of each part of the memory.
        available: Free bytes, if they are known.
        copies: How many processes of this machine will hold the memory.

    Returns:
        What is needed, in words.

    Examples:
        >>> check_capacity({"keys": 2**30, "values": 2**29}, available=2**40)
        '1.50 GiB (keys 1.00 GiB, values 0.50 GiB)'
    """
    total = sum(needed.values())
    parts = ", ".join(f"{name} {size(count)}" for name, count in needed.items())
    words = f"{size(total)} ({parts})"
    if available is not None and total * copies > available:
        on_each = f" in each of {copies} processes" if copies > 1 else ""
        warnings.warn(
            f"The memory will need {words}{on_each}, but only {size(available)} are free. Store keys in half precision "
            "(LocalMemory(key_dtype=torch.float16)), memorize fewer rows (max_rows=), take a narrower "
            "embedding (embedding=), or use fewer processes on this machine.",
            ResMemWarning,
            stacklevel=2,
        )
    return words


def sample_of(provenance: Mapping[str, str]) -> dict[str, int | str]:
    """Of which rows a memory is a sample: `max_rows`, `keep` and `rows_seen`; nothing if it was to have all.

    Args:
        provenance: Of the memory.
    """
    if "max_rows" not in provenance:
        return {}
    counts = {name: int(provenance[name]) for name in ("max_rows", "rows_seen")}
    return {**counts, "keep": provenance["keep"]}


def size(count: int) -> str:
    """A number of bytes for people.

    Examples:
        >>> size(3 * 2**20)
        '3.0 MiB'
    """
    if count >= 2**29:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**19 else f"{count / 2**10:.1f} KiB"
