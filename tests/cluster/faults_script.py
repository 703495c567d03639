"""What happens to a RayMemory when things die: simulated nodes, killed piece by piece. For `test_faults.py`.

Run as `python faults_script.py DIRECTORY`; what was found is in `DIRECTORY/found.json`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster

from lightning_resmem import LocalMemory, RayMemory, ResMemError, ResMemParams
from lightning_resmem.cluster.sharding import split

ROWS, WIDTH, CLASSES = 4000, 16, 10
PARAMS = ResMemParams(k=12, sigma=2.0)
SECONDS = 90.0  # for what has to work, on a busy machine
# A killed node refuses connections at once; one that is merely slow has time.
HEALTH = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
}


class World:
    """A cluster, rows, and what a LocalMemory with these rows answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": 100 * 2**20,
                "include_dashboard": False,
                "_system_config": HEALTH,
            },
        )
        self.nodes = [self.add_node() for _ in range(2)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        generator = torch.Generator().manual_seed(0)
        self.keys = torch.randn(ROWS, WIDTH, generator=generator)
        self.outputs = torch.randn(ROWS, CLASSES, generator=generator)
        self.targets = torch.randint(CLASSES, (ROWS,), generator=generator)
        self.queries = torch.randn(64, WIDTH, generator=generator)
        local = LocalMemory(params=PARAMS)
        local.add(self.keys, self.outputs, self.targets)
        self.neighbors, self.expected = local.search(self.queries, 12), local(self.queries)

    def add_node(self, cpus: int = 2) -> Any:
        return self.cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20)

    def memory(self, num_shards: int = 2, **options: Any) -> RayMemory:
        settings = {
            "storage_path": self.directory / "shards",
            "request_timeout_s": SECONDS,
            "placement": "STRICT_SPREAD",
        }
        return RayMemory(num_shards, params=PARAMS, **({"placement": "STRICT_SPREAD"} | settings | options))

    def fill(self, memory: RayMemory, start: int = 0, stop: int = ROWS, step: int = 250) -> None:
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            memory.add(self.keys[rows], self.outputs[rows], self.targets[rows], torch.arange(rows.start, rows.stop))

    def is_right(self, memory: RayMemory) -> bool:
        found = memory.search(self.queries, 12)
        return (
            torch.equal(found.ids, self.neighbors.ids)
            and torch.allclose(memory(self.queries), self.expected, atol=1e-6)
            and torch.equal(memory.ids, torch.arange(ROWS))
        )

    def is_noticed(self, dead: Any) -> bool:
        """Whether the cluster knows that a node is dead."""
        return not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == dead.node_id)


def pids(memory: RayMemory) -> list[int]:
    return [shard["pid"] for shard in memory.stats()["shards"]]


def until(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def killed_while_filling(world: World) -> dict[str, Any]:
    """Rows arrive, an actor dies, more rows arrive, another dies while it builds."""
    memory = world.memory()
    world.fill(memory, 0, 2000)
    memory.shards.flush()
    os.kill(pids(memory)[0], signal.SIGKILL)
    world.fill(memory, 2000, ROWS)
    second = pids(memory)[1]
    threading.Timer(0.02, os.kill, (second, signal.SIGKILL)).start()
    memory.build()
    until(lambda: not Path(f"/proc/{second}").exists())
    found = {"right": world.is_right(memory), "rows": len(memory)}
    left = [path.name for path in (world.directory / "shards").rglob("*") if ".partial" in path.name]
    memory.shutdown()
    return found | {"half-built": left, "storage": os.listdir(world.directory / "shards")}


def killed_while_asked(world: World) -> dict[str, Any]:
    """Many queries under way, and one actor after the other is killed."""
    memory = world.memory()
    world.fill(memory)
    memory.build()
    wrong, asked, done = [], [0], threading.Event()

    def ask() -> None:
        while not done.is_set():
            try:
                if not torch.allclose(memory(world.queries), world.expected, atol=1e-6):
                    wrong.append("other sums")
            except Exception as error:
                wrong.append(repr(error))
            asked[0] += 1

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    for shard in range(2):
        before = asked[0]
        until(lambda before=before: asked[0] > before + 10)
        os.kill(pids(memory)[shard], signal.SIGKILL)
        until(lambda shard=shard: memory.stats()["shards"][shard]["restarts"] == 1)
    before = asked[0]
    until(lambda: asked[0] > before + 10)
    done.set()
    for caller in callers:
        caller.join(SECONDS)
    restarts = [shard["restarts"] for shard in memory.stats()["shards"]]
    found = {"wrong": wrong, "asked": asked[0], "restarts": restarts, "right": world.is_right(memory)}
    memory.shutdown()
    return found


def edits_survive(world: World) -> dict[str, Any]:
    """What was removed and changed after the last build stays so when the actors are killed before the next."""
    memory = world.memory(1)
    world.fill(memory)
    memory.build()
    memory.add(world.keys[:1] + 100, world.outputs[:1], world.targets[:1], torch.tensor([ROWS]))
    memory.remove([ROWS, 5])
    memory.update([6], targets=(world.targets[6:7] + 1) % CLASSES)
    memory.shards.flush()
    os.kill(pids(memory)[0], signal.SIGKILL)
    local = LocalMemory(params=PARAMS)
    local.add(world.keys, world.outputs, world.targets)
    local.remove([5])
    local.update([6], targets=(world.targets[6:7] + 1) % CLASSES)
    found = {"right": torch.allclose(memory(world.keys[:20]), local(world.keys[:20]), atol=1e-6), "rows": len(memory)}
    memory.shutdown()
    return found


def rows_lost(world: World) -> dict[str, Any]:
    """An actor dies and its storage is gone with it: an error, or the copy of its replica."""
    memory = world.memory(1, request_timeout_s=30.0)
    world.fill(memory)
    memory.build()
    directory = Path(memory.shards.pool.config.storage_path)
    shutil.rmtree(directory / "shard-0000-0")
    os.kill(pids(memory)[0], signal.SIGKILL)
    found: dict[str, Any] = {}
    try:
        memory(world.queries)
    except ResMemError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    memory.clear()
    world.fill(memory)
    found["right after filling it again"] = world.is_right(memory)
    memory.shutdown()

    memory = world.memory(1, replicas=2)
    world.fill(memory)
    memory.build()
    directory = Path(memory.shards.pool.config.storage_path)
    shutil.rmtree(directory / "shard-0000-1")
    os.kill(pids(memory)[1], signal.SIGKILL)
    found["right with a replica"] = all(world.is_right(memory) for _ in range(5))

    # Asked again and again, the replica that lost its rows is noticed and copies them.
    def has_copied() -> bool:
        memory(world.queries)
        try:
            return bool(ray.get(memory.shards.pool.actors[0][1].state.remote(), timeout=SECONDS)["rows"] == ROWS)
        except ray.exceptions.RayError:
            return False

    found["copied"] = until(has_copied)
    os.kill(ray.get(memory.shards.pool.actors[0][0].ping.remote(), timeout=SECONDS)[1], signal.SIGKILL)
    found["right from the copy"] = world.is_right(memory)
    memory.shutdown()
    return found


def journal_damaged(world: World) -> dict[str, Any]:
    """A bit of a change flips on the disk, and the actor dies: an error that names it, or what the replica has."""
    found: dict[str, Any] = {}
    for replicas in (1, 2):
        memory = world.memory(1, replicas=replicas, request_timeout_s=30.0)
        world.fill(memory)
        memory.shards.flush()
        directory = Path(memory.shards.pool.config.storage_path)
        file = next((directory / "shard-0000-0").glob("0000000003-*"))
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        os.kill(ray.get(memory.shards.pool.actors[0][0].ping.remote(), timeout=SECONDS)[1], signal.SIGKILL)
        try:
            memory.build()
            found[f"right with {replicas}"] = world.is_right(memory)
        except ResMemError as error:
            found[f"error with {replicas}"] = f"{type(error).__name__}: {error}"
            found["named"] = file.name in str(error)
            memory.clear()
            world.fill(memory)
            found["right after filling it again"] = world.is_right(memory)
        memory.shutdown()
    return found


def node_dies_with_replicas(world: World) -> dict[str, Any]:
    """Two copies on two nodes; a node dies while queries are under way, and the other one while nobody asks."""
    memory = world.memory(2, replicas=2, placement="SPREAD", cpus_per_shard=1)
    world.fill(memory)
    memory.build()
    seconds, wrong = [], 0

    def ask(times: int) -> None:
        nonlocal wrong
        for _ in range(times):
            started = time.monotonic()
            wrong += not torch.allclose(memory(world.queries), world.expected, atol=1e-6)
            seconds.append(round(time.monotonic() - started, 3))

    ask(40)
    homes: dict[int, set[str]] = {}
    for shard in memory.stats()["shards"]:
        homes.setdefault(shard["shard"], set()).add(shard["node"])
    found: dict[str, Any] = {"nodes of each shard": [len(nodes) for nodes in homes.values()]}
    found["searches of each replica"] = [shard["searches"] for shard in memory.stats()["shards"]]

    # All the while: before it dies, until that is noticed, and afterwards.
    threading.Timer(0.5, world.cluster.remove_node, (world.nodes[1], False)).start()
    while not world.is_noticed(world.nodes[1]):
        ask(1)
    ask(40)
    found["metrics"] = memory.metrics()
    found["asked"], seconds = seconds, []

    world.nodes[1] = world.add_node()
    processes = [Path(f"/proc/{s['pid']}") for s in memory.stats()["shards"] if s["node"] == world.nodes[0].node_id]
    world.cluster.remove_node(world.nodes[0], False)
    until(lambda: world.is_noticed(world.nodes[0]) and not any(process.exists() for process in processes))
    ask(40)
    found["asked afterwards"] = seconds
    world.nodes[0] = world.add_node()
    memory.shutdown()  # which waits for replicas that have no place
    return found | {"wrong": wrong}


def node_dies_and_its_shard_moves(world: World) -> dict[str, Any]:
    """A query is under way when its node dies; the shard starts elsewhere, from storage_path."""
    memory = world.memory(2, placement="STRICT_SPREAD")
    world.fill(memory)
    memory.build()
    before = [shard["node"] for shard in memory.stats()["shards"]]
    dying = next(node for node in world.nodes if node.node_id == before[1])
    process, wrong = Path(f"/proc/{pids(memory)[1]}"), 0

    def ask() -> None:
        nonlocal wrong
        wrong += not torch.allclose(memory(world.queries), world.expected, atol=1e-6)

    threading.Timer(0.3, world.cluster.remove_node, (dying, False)).start()
    while process.exists():
        ask()
    for _ in range(50):  # the first of which waits for the shard
        ask()
    after = [shard["node"] for shard in memory.stats()["shards"]]
    world.nodes[world.nodes.index(dying)] = world.add_node()
    found = {"wrong": wrong, "moved": after[1] == before[0] != before[1], "right": world.is_right(memory)}
    memory.shutdown()
    return found


def no_place_left(world: World) -> dict[str, Any]:
    """A node dies and no other has room: an error in time, or an answer from the rest, until a node comes back."""
    memory = world.memory(2, cpus_per_shard=2)
    memory.shards.open()
    world.fill(memory)
    memory.build()
    twin = world.memory(2, on_shard_loss="partial")
    twin.shards.follow(world.cluster.address, memory.shards.name)
    twin.learn(memory.shards.pool.everywhere("state"))
    memory.shards.pool.timeout = twin.shards.pool.timeout = 4.0
    nodes, process = [shard["node"] for shard in memory.stats()["shards"]], Path(f"/proc/{pids(memory)[0]}")
    dying = next(node for node in world.nodes if node.node_id == nodes[0])
    world.cluster.remove_node(dying, False)
    until(lambda: not process.exists())  # it lives a little longer than its node, and answers
    found: dict[str, Any] = {"node": nodes[0]}
    started = time.monotonic()
    try:
        memory(world.queries)
    except ResMemError as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["error after"] = time.monotonic() - started
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        partial = twin.search(world.queries, 12)
        started = time.monotonic()
        again = twin.search(world.queries, 12)
        found["second partial answer after"] = time.monotonic() - started
        twin(world.queries)
    found["warnings"] = [str(warning.message) for warning in caught if "shard" in str(warning.message)]
    rest = LocalMemory(params=PARAMS)
    kept = split(torch.arange(ROWS), 2)[1]
    rest.add(world.keys[kept], world.outputs[kept], world.targets[kept], kept)
    found["partial is right"] = torch.equal(partial.ids, rest.search(world.queries, 12).ids)
    found["partial is right"] &= torch.equal(again.ids, partial.ids)
    found["alive"] = [shard["alive"] for shard in twin.stats()["shards"]]
    found["metrics"], found["share"] = twin.metrics(), len(kept) / ROWS
    world.nodes[world.nodes.index(dying)] = world.add_node()
    found["comes back"] = until(lambda: twin.metrics()["resmem/coverage"] == 1.0)
    found["right"] = world.is_right(twin)
    memory.shards.pool.timeout = SECONDS
    found["right for the other"] = world.is_right(memory)
    memory.shutdown()
    return found


DRIVER = """
import os, sys, torch
from lightning_resmem import RayMemory
memories = []
for name in (None, "kept"):
    memory = RayMemory(1, name=name, address=sys.argv[1], storage_path=sys.argv[2], request_timeout_s=90.0)
    memories.append(memory)
    memory.add(torch.eye(3), torch.zeros(3, 3), torch.arange(3))
    memory.build()
    print(memory.shards.name, memory.stats()["shards"][0]["pid"], flush=True)
sys.stdin.read()
"""


def driver_dies(world: World) -> dict[str, Any]:
    """The process that made them is killed: its actors end, those of a named pool stay."""
    storage = world.directory / "shards of a driver"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, world.cluster.address, str(storage)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [driver.stdout.readline().split() for _ in range(2)]
    (_, first), (_, second) = lines
    driver.kill()
    driver.wait()
    found: dict[str, Any] = {"gone": until(lambda: not Path(f"/proc/{first}").exists(), 30.0)}
    kept = RayMemory.connect("kept", address=world.cluster.address, request_timeout_s=SECONDS)
    found["kept"] = len(kept.search(torch.eye(3), 1).ids)
    kept.shutdown()
    found["ended"] = until(lambda: not Path(f"/proc/{second}").exists(), 30.0)
    [left] = os.listdir(storage)
    memory = world.memory(1, storage_path=storage)
    memory.shards.open()
    found["swept"] = left not in os.listdir(storage)
    memory.shutdown()
    return found


SCENARIOS = [
    killed_while_filling,
    killed_while_asked,
    edits_survive,
    rows_lost,
    journal_damaged,
    node_dies_with_replicas,
    node_dies_and_its_shard_moves,
    no_place_left,
    driver_dies,
]


def main(directory: Path, *names: str) -> None:
    world = World(directory)
    found: dict[str, Any] = {}
    try:
        for scenario in SCENARIOS:
            if names and scenario.__name__ not in names:
                continue
            started = time.monotonic()
            try:
                found[scenario.__name__] = scenario(world)
            except Exception:
                found[scenario.__name__] = {"failed": traceback.format_exc()}
            print(scenario.__name__, f"{time.monotonic() - started:.1f} s", found[scenario.__name__], flush=True)
    finally:
        (directory / "found.json").write_text(json.dumps(found))
        ray.shutdown()
        world.cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
