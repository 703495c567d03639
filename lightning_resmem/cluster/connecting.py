"""Connect this process to a Ray cluster: to one that runs, or to one that is started here."""

import logging
import math
import os
import socket
import tempfile
from collections.abc import Collection
from pathlib import Path

import ray

from lightning_resmem.cluster.address import check_answers, host_and_port, knock, no_cluster
from lightning_resmem.errors import InputError

_log = logging.getLogger("lightning_resmem")

# What a Ray that is started here keeps for objects in flight.
_OBJECT_STORE_BYTES = 512 * 2**20


def reach(address: str | None, hosts: Collection[str] = (), cpus: float = 1, starts: bool = True) -> str:
    """Connect this process to a cluster, unless it is already: a running one, or one that is started here.

    Args:
        address: Of a cluster; None looks for a running one.
        hosts: The machines of this job: on more than one of them nothing is started here.
        cpus: What shards need; a cluster that is started here has at least so many.
        starts: Whether one may be started here.

    Returns:
        The address that others connect to.

    Raises:
        InputError: If no cluster answers, or there is none.
    """
    if not ray.is_initialized():
        running = address or os.environ.get("RAY_ADDRESS") or _latest_cluster()
        if running is not None:
            _join(running)
        elif not starts:
            raise InputError("address=None, but no Ray cluster is running on this machine: give the address of one.")
        elif len(set(hosts)) > 1:
            raise InputError(
                f"address=None, but no Ray cluster is running and this job has {len(set(hosts))} machines "
                f"({', '.join(sorted(set(hosts)))}). Start one before the job: `ray start --head --port=6379` on the "
                "first machine and `ray start --address=FIRST:6379` on the others (under SLURM: `srun ray "
                "symmetric-run --address FIRST:6379 -- python script.py`)."
            )
        else:
            count = max(os.cpu_count() or 1, math.ceil(cpus))
            ray.init(
                address="local",
                num_cpus=count,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
            _log.info("No Ray cluster is running: started a local one with %d CPUs.", count)
    connected = str(ray.get_runtime_context().gcs_address)
    if address and not _is_same(address, connected):
        raise InputError(
            f"address={address!r}, but this process is connected to the Ray cluster at {connected}, and it can be in "
            "one only: leave address out, or call ray.shutdown() before."
        )
    return connected


def _is_same(address: str, connected: str) -> bool:
    """Whether two addresses `HOST:PORT` are one; also where that cannot be told, as for "auto"."""
    try:
        first, second = ((socket.gethostbyname(host), port) for host, port in map(host_and_port, (address, connected)))
    except OSError:
        return True
    return "://" in address or ":" not in address or first == second


def _latest_cluster() -> str | None:
    """The address of the cluster that `ray start` started on this machine, where Ray notes it.

    `address="auto"` would also join the Ray that another process keeps for itself, and that ends with that process.
    """
    noted = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    try:
        address = noted.read_text().strip()
        knock(address)  # what a Ray that was killed has noted stays
    except (OSError, ValueError):
        return None
    return address


def _join(address: str) -> None:
    check_answers(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError) as error:  # no answer, or an address that there cannot be
        raise no_cluster(address, error) from error
