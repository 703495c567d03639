"""Start the actors of a pool, each on a node that has room for it."""

import itertools
import re
from collections import Counter
from typing import Any, cast

import ray
from ray.util import list_named_actors
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lightning_resmem.cluster.config import PoolConfig
from lightning_resmem.cluster.shard import SEARCHES, Shard
from lightning_resmem.cluster.sharding import assign
from lightning_resmem.errors import InputError, ShardUnavailableError

# Calls that a shard works on at the same time.
_CONCURRENCY = 16


def actor_name(pool: str, shard: int, replica: int) -> str:
    """Under which Ray knows a replica of a shard."""
    return f"{pool}/{shard}.{replica}"


def start(config: PoolConfig, timeout: float) -> list[list[Any]]:
    """Start the actors of a pool that has a name; returns for each shard its replicas, which may not answer yet.

    Raises:
        InputError: If there is a pool of that name.
        ShardUnavailableError: If the cluster has no room for them within the timeout.
    """
    assert config.name is not None
    nodes = _reserve(config, timeout)
    copies = [itertools.count() for _ in range(config.num_shards)]
    actors: list[list[Any]] = [[None] * config.replicas for _ in range(config.num_shards)]
    # Ray's annotations do not know of the groups.
    actor = cast(Any, ray.remote)(concurrency_groups={SEARCHES: 1})(Shard)
    # Shard 0 first: if there is a pool of that name, the others are not started.
    for shard, node in sorted(zip(assign(nodes, config.num_shards), nodes, strict=True)):
        replica = next(copies[shard])
        try:
            actors[shard][replica] = actor.options(
                name=actor_name(config.name, shard, replica),
                namespace=config.namespace,
                lifetime="detached" if config.detached else None,
                num_cpus=config.cpus_per_shard,
                num_gpus=config.gpus_per_shard,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=_CONCURRENCY,
                # Soft: when its node is gone, an actor is started again wherever there is room.
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
            ).remote(config, shard, replica)
        except ValueError as error:
            if "already" not in str(error):
                raise
            raise InputError(
                f"name={config.name!r} is a pool that is there already: RayMemory.connect({config.name!r}) finds "
                "it, and its shutdown() ends it. Or choose another name."
            ) from error
    return actors


def _reserve(config: PoolConfig, timeout: float) -> list[str]:
    """The node of each place that Ray finds for the shards."""
    bundle = {"CPU": config.cpus_per_shard, "GPU": config.gpus_per_shard}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    count = config.num_shards * config.replicas
    group = placement_group([bundle] * count, strategy=config.placement)
    try:
        if not group.wait(timeout):
            raise _no_room(config, timeout, f"{count} x {bundle}")
        nodes = placement_group_table(group)["bundles_to_node_id"]
        return [nodes[place] for place in range(count)]
    finally:
        # Only asked for: actors that live in a group die with it, and cannot move when a node is gone.
        remove_placement_group(group)


def _no_room(config: PoolConfig, timeout: float, asked: str) -> ShardUnavailableError:
    """The error for a cluster without room, which says what there is."""
    free = ray.available_resources()
    existing = "; ".join(
        f"node {node['NodeID'][:12]} ({node['NodeManagerHostname']}): "
        + ", ".join(f"{name} {node['Resources'].get(name, 0):g}" for name in ("CPU", "GPU"))
        for node in ray.nodes()
        if node["Alive"]
    )
    return ShardUnavailableError(
        f"There is no room for {config.num_shards} shards x {config.replicas} replicas with placement="
        f"{config.placement!r} within {timeout:g} s. Asked: {asked}"
        f"{', each on a node of its own' if config.placement == 'STRICT_SPREAD' else ''}. The cluster has: "
        f"{existing}; free are CPU {free.get('CPU', 0):g}, GPU {free.get('GPU', 0):g}. {_others()}Use fewer "
        "shards, less for each (cpus_per_shard, gpus_per_shard), another placement, or add nodes."
    )


def _others() -> str:
    """What to do about the pools that the cluster has already, of this process and of others."""
    names = (re.fullmatch(r"(.+)/\d+\.\d+", actor["name"]) for actor in list_named_actors(all_namespaces=True))
    pools = Counter(name[1] for name in names if name)
    if not pools:
        return ""
    held = ", ".join(f"{name!r} ({count} actor{'s' * (count > 1)})" for name, count in sorted(pools.items()))
    return (
        f"Other pools of RayMemory hold a part of it: {held}. The shutdown() of a memory frees what its pool holds, "
        "RayMemory.connect(name).shutdown() that of a process which has ended. "
    )
