"""Start real ranks for a test: processes with a gloo group, whose results come back, and none of which is left."""

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.interpreters import Finished, run_python

GROUP_SECONDS = 60.0  # timeout of the process groups: an interpreter that starts on a busy machine needs some
OF_RANKS = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    directory: Path,
    *args: Any,
    seconds: float = 120.0,
    group_seconds: float = GROUP_SECONDS,
) -> list[Any]:
    """Run `function(rank, *args)` on ranks with a process group; what each returned, None where a rank died.

    `function` is a top-level function of an importable module, which forks of a fresh interpreter find by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    call = directory / "call.pkl"
    call.write_bytes(pickle.dumps((function, world_size, free_port(), group_seconds, directory, args)))
    code = "import sys; from tests.ddp_processes import start_ranks; start_ranks(sys.argv[1], float(sys.argv[2]))"
    # Ranks have one thread each: more would only fight over the cores.
    ended = run_python("-c", code, call, seconds, env=os.environ | {"OMP_NUM_THREADS": "1"}, seconds=seconds + 30)
    print(ended.output)
    assert ended.code == 0, ended.output[-4000:]
    files = [directory / f"rank{rank}.pkl" for rank in range(world_size)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def start_ranks(call: str, seconds: float) -> None:
    """In a process of its own: start the ranks, and wait for them."""
    function, world_size, *others = pickle.loads(Path(call).read_bytes())
    context = mp.get_context("fork")
    ranks = [context.Process(target=_rank, args=(function, rank, world_size, *others)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    if hanging:
        print(f"ranks {hanging} were still running after {seconds} s")
    sys.stdout.flush()
    os._exit(len(hanging))  # at once: to end an interpreter that has imported much takes half a second


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


def run_script(script: Path, *args: object, seconds: float = 150.0) -> Finished:
    """Run a script as a user does who has no ranks yet, and no GPU."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_python(script, *args, env=environment, seconds=seconds)
