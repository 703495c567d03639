"""Reaching a cluster, and leaving it."""

import os
import socket
from pathlib import Path

import pytest
import torch

from lightning_resmem import InputError, RayMemory
from tests.interpreters import run_python
from tests.memory.test_contract import Data

pytestmark = pytest.mark.slow


def test_what_is_no_address() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # a port that nobody listens at
        free = listener.getsockname()[1]
        addresses = [f"127.0.0.1:{free}", f"localhost:{free}", f"[::1]:{free}", "127.0.0.1:99999", "localhost:redis"]
        code = f"""if True:
            import time, torch
            from lightning_resmem import InputError, RayMemory
            for address in {["nonsense", *addresses]!r}:
                started = time.monotonic()
                try:
                    RayMemory(1, address=address).add(torch.eye(2), torch.eye(2), torch.arange(2))
                except InputError as error:
                    print(time.monotonic() - started, str(error).replace(chr(10), " "))
        """
        done = run_python("-c", code, seconds=170)
    for address, line in zip(["nonsense", *addresses], done.stdout.splitlines(), strict=True):
        seconds, said = line.split(maxsplit=1)
        assert f"address={address!r}: no Ray cluster can be joined there" in said
        assert "ray start --head --port=6379" in said
        assert float(seconds) < 30  # Ray itself takes more than 80


def test_another_cluster_than_the_one_that_the_process_is_in(ray_address: str, data: Data) -> None:
    host, _, port = ray_address.rpartition(":")
    memory = RayMemory(1, address=f"{host}:{int(port) + 1}")
    with pytest.raises(InputError, match=rf"address='{host}:\d+', but this process is connected .* at {ray_address}"):
        data.add_to(memory, torch.arange(3))


_LEAVES_RAY = """
import sys, ray, torch
from lightning_resmem import RayMemory, ResMemParams, ShardUnavailableError

memory = RayMemory(1, params=ResMemParams(k=1), storage_path=sys.argv[1])
memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
memory.build()
ray.shutdown()
for ask in (lambda: memory.search(torch.eye(2), 1), memory.metrics):
    try:
        ask()
    except ShardUnavailableError as error:
        print(error)
memory.clear()
print(len(memory), "rows")
"""


def test_a_process_that_leaves_ray(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = run_python("-c", _LEAVES_RAY, tmp_path, env=environment)
    assert ended.code == 0, ended.output
    assert ended.stdout.count("The shards ended when this process left Ray (ray.shutdown())") == 2
    assert ended.stdout.endswith("0 rows\n")
