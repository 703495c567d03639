"""A memory over three nodes, one of which dies while two DDP ranks ask it: the same accuracy at the end.

    python examples/multinode.py    # about a minute; the three nodes are simulated on this machine

Rank 0 starts a Ray cluster of three nodes. Both ranks train a small network on digits and send the residuals of their
rows straight to three shards, one on each node. In the second of two tests a node is killed. Its shard is started again
on another node from what it had saved, and the batch that waits for it gets its answer late, but right.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import lightning.pytorch as L
import ray
from digits import MLP, split
from ray.cluster_utils import Cluster
from torch.utils.data import DataLoader

from lightning_resmem import RayMemory, ResMemCallback

# A dead node is noticed after 2 seconds instead of Ray's usual 15 or so.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 4,
}
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20}


class KillNode(L.Callback):
    """Kills a node that holds a shard, before the given batch of a test."""

    def __init__(self, cluster: Cluster, memory: RayMemory, before_batch: int) -> None:
        self._cluster, self._memory, self._before_batch = cluster, memory, before_batch

    def on_test_batch_start(self, trainer: L.Trainer, model: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != self._before_batch:
            return
        others = {node.node_id: node for node in self._cluster.list_all_nodes() if not node.head}
        shard = next(shard for shard in self._memory.stats()["shards"] if shard["node"] in others)
        tell(f"Before batch {batch_idx} node {short(shard['node'])} is killed, with shard {shard['shard']}")
        self._cluster.remove_node(others[shard["node"]], allow_graceful=False)
        with suppress(ProcessLookupError):  # a machine takes its processes along, a simulated one only soon
            os.kill(shard["pid"], signal.SIGKILL)


def short(node_id: str) -> str:
    return node_id[:6]


@contextmanager
def quiet() -> Iterator[None]:
    """Show what `tell` tells alone: Ray reports the death of a node at length. An exception is shown afterwards."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def tell(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


def start_cluster() -> Cluster:
    """Three nodes, which this process and those that it starts join by RAY_ADDRESS."""
    head = {**NODE, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    return cluster


def make_trainer(epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def run(epochs: int, storage: str, cluster: Cluster | None) -> None:
    """What each rank does; rank 0 has the cluster and tells the story."""
    ray.init(logging_level=logging.ERROR, log_to_driver=False)  # RayMemory would do it, with Ray's warnings
    L.seed_everything(0, verbose=False)
    train, val, test = split(seed=0)
    memory = RayMemory(num_shards=3, storage_path=storage)  # all that a cluster changes
    trainer, model = make_trainer(epochs, [ResMemCallback(memory=memory)]), MLP(hidden=16)
    say = tell if cluster is not None else lambda _: None

    def accuracy(number: str) -> float:
        started = time.monotonic()
        (scores,) = trainer.test(model, DataLoader(test, batch_size=32), verbose=False)
        base, resmem = scores["test/acc_base"], scores["test/acc_resmem"]
        say(f"{number} test: base {base:.4f}, resmem {resmem:.4f} in {time.monotonic() - started:.1f} s")
        return resmem

    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True), DataLoader(val, batch_size=64))
    if cluster is not None:
        say(f"Two ranks trained, and memorized {len(memory)} rows:{places(memory)}")
    before = accuracy("First")
    if cluster is not None:
        trainer.callbacks.append(KillNode(cluster, memory, before_batch=3))
    after = accuracy("Second")
    if cluster is not None:
        say(f"Afterwards:{places(memory)}")
    say("The same accuracy." if after == before else f"Not the same accuracy: {before} and {after}.")
    trainer.strategy.barrier()
    if cluster is not None:  # it ends last
        memory.shutdown()
        for process in trainer.strategy.launcher.procs:
            process.wait()


def places(memory: RayMemory) -> str:
    lines = [
        f"\n  shard {shard['shard']}: {shard['rows']} rows on node {short(shard['node'])}"
        + (f", started again {shard['restarts']} time(s)" if shard["restarts"] else "")
        for shard in memory.stats()["shards"]
    ]
    return "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: 10)")
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:  # the other rank: rank 0 runs this script once more
        with quiet():
            run(arguments.epochs, os.environ["RESMEM_STORAGE"], cluster=None)
            ray.shutdown()
        return
    with tempfile.TemporaryDirectory() as storage, quiet():  # on a real cluster, one that all nodes see
        os.environ["RESMEM_STORAGE"] = storage
        cluster = start_cluster()
        tell(f"Three nodes: {', '.join(short(node.node_id) for node in cluster.list_all_nodes())}")
        try:
            run(arguments.epochs, storage, cluster)
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main()
