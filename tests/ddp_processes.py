"""Start real ranks for a test: processes with a gloo group, whose results come back, and none of which is left."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
GROUP_SECONDS = 30.0  # timeout of the process groups: two interpreters that start together on a busy machine need some


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    directory: Path,
    *args: Any,
    seconds: float = 90.0,
    group_seconds: float = GROUP_SECONDS,
) -> list[Any]:
    """Run `function(rank, *args)` on ranks with a process group; what each returned, None where a rank died.

    The processes are forked from a fresh one that has imported the libraries and done nothing else, so `function` is a
    top-level function of an importable module.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "torchmetrics", "rich.progress", "sklearn.datasets", "psutil"])
    port = free_port()
    directory.mkdir(parents=True, exist_ok=True)
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, group_seconds, directory, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert not hanging, f"ranks {hanging} were still running after {seconds} s"
    files = [directory / f"rank{rank}.pkl" for rank in range(world_size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    group_seconds: float,
    directory: Path,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    # As torchrun does, so that a Trainer finds its rank, too, and starts no processes of its own.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        NODE_RANK="0",
    )
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=group_seconds), init_method="env://"
    )
    result = function(rank, *args)
    file = directory / f"rank{rank}.pkl"
    file.write_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


class Finished(NamedTuple):
    """A script that ended: how, what it wrote, and the processes that it left running."""

    code: int
    output: str
    seconds: float
    left: list[int]


def run_script(script: Path, *args: object, seconds: float = 90.0) -> Finished:
    """Run a script as a user does; whatever it started is killed with it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started = time.monotonic()
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{script.name} {args} was still running after {seconds} s:\n{output[-4000:]}") from None
    took, deadline = time.monotonic() - started, time.monotonic() + 5.0
    while (left := _processes_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return Finished(process.returncode, output, took, left)


def _processes_of(process_group: int) -> list[int]:
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == process_group and fields[0] != "Z":
                left.append(int(entry.name))
    return left
