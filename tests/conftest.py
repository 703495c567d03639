"""Fixtures for all tests: nothing may be left behind, everything is seeded, and one small real data set.

Those of tests/gpu run on machines that have little beside torch and Lightning: what else is used here is imported where
it is, if it is there.
"""

import contextlib
import glob
import importlib.util
import logging
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch

from tests.interpreters import server_pid

if TYPE_CHECKING:
    import psutil

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples on every run: a failure is there again when one looks at it.
    settings.register_profile("resmem", deadline=None, derandomize=True, database=None, max_examples=50)
    settings.load_profile("resmem")

# How long threads and processes that were told to end may take.
_GRACE_SECONDS = 5.0

# What Lightning, torch and OpenMP leave in the environment by design; undone, but no failure.
_TOLERATED_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "OMP_NUM_THREADS",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "RANK",
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_WARM_POOL",
    "TRITON_CACHE_DIR",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_PTXAS_PATH",
    "WORLD_SIZE",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}

# Helpers of the standard library, of torch.compile and of MPI (which Lightning starts where it finds mpi4py) that live
# as long as the interpreter, by design; and workers that Ray keeps ready, and actors that Ray Data keeps.
_TOLERATED_PROCESSES = (
    "resource_tracker",
    "multiprocessing.forkserver",
    "_inductor/compile_worker",
    "orted",
    "ray::IDLE",
    "ray::_AutoscalingCoordinatorActor",
    "ray::_StatsActor",
    "ray::ActorLocationTracker",
    "ray/_private/workers/default_worker.py",
)


def _until_gone(alive: Callable[[], list]) -> list:
    """What `alive()` still returns when the grace period is over."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while left := alive():
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: the workers end together, with short ones."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _threads_for_torch() -> Iterator[None]:
    """Small tensors gain nothing from many threads, and those of several workers would only fight over the cores."""
    before, workers = torch.get_num_threads(), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, min(4, (os.cpu_count() or 1) // workers))
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(threads))  # of the processes that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _rays_of_their_own() -> Iterator[None]:
    """A directory where Ray keeps sockets, and notes the cluster to join: no other process of pytest finds it there."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", directory)  # a short path: those of sockets may have 107 bytes
        patch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine actors would hardly start
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- the global generator is what other people's code draws from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _lightning_speaks_again() -> Iterator[None]:
    """Examples that run in this process silence it."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _no_environment_left() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    after.pop("PYTEST_CURRENT_TEST", None)
    before.pop("PYTEST_CURRENT_TEST", None)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in changed:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    changed -= _TOLERATED_ENVIRONMENT
    assert not changed, f"the test changed the environment: {sorted(changed)}"


@pytest.fixture(autouse=True)
def _no_directory_change() -> Iterator[None]:
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before, f"the test changed the working directory to {after}"


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield

    def new() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]

    left = _until_gone(new)
    assert not left, f"the test left threads that keep the interpreter from ending: {left}"


def _descendants() -> list["psutil.Process"]:
    """Processes that this one started, however deep."""
    import psutil

    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        return psutil.Process().children(recursive=True)
    # Each test asks twice: to read those of all processes of the machine takes longer than most tests.
    found, parents = [], [os.getpid()]
    gone = contextlib.suppress(OSError, psutil.NoSuchProcess)
    while parents:
        for list_of_thread in glob.glob(f"/proc/{parents.pop()}/task/*/children"):
            pids: list[int] = []
            with gone, open(list_of_thread) as file:
                pids = [*map(int, file.read().split())]
            parents += pids
            for pid in pids:
                with gone:
                    found.append(psutil.Process(pid))
    return found


def _children() -> list["psutil.Process"]:
    """Descendants, except finished ones and tolerated helpers."""
    import psutil

    running = []
    for child in _descendants():
        try:
            command = " ".join(child.cmdline())
            if child.status() == psutil.STATUS_ZOMBIE or child.pid == server_pid():
                continue
            if not any(name in command for name in _TOLERATED_PROCESSES):
                running.append(child)
        except psutil.NoSuchProcess:
            continue
    return running


def _actor(process: "psutil.Process") -> str:
    """The class of the Ray actor that a process is, or nothing."""
    import psutil

    try:
        title = process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""
    return title.strip().partition(".")[0] if title.startswith("ray::") else ""


@pytest.fixture(autouse=True)
def _no_processes_left() -> Iterator[None]:
    if importlib.util.find_spec("psutil") is None:
        yield
        return
    # Those that a fixture of wider scope started (a cluster, say) are there already, and stay; an actor of theirs that
    # the test kills is started again.
    before = {child: _actor(child) for child in _children()}
    yield

    def new() -> list["psutil.Process"]:
        running, left = _children(), []
        ended = Counter(actor for child, actor in before.items() if actor and child not in running)
        for child in running:
            if child in before:
                continue
            actor = _actor(child)
            if ended[actor]:
                ended[actor] -= 1
            else:
                left.append(child)
        return left

    left = _until_gone(new)
    for child in left:
        child.kill()
    assert not left, f"the test left processes: {left}"


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    left = torch.distributed.is_available() and torch.distributed.is_initialized()
    if left:
        torch.distributed.destroy_process_group()
    assert not left, "the test left a torch.distributed process group"


class Rows(NamedTuple):
    """Part of a data set: inputs `(N, 64)`, float32 in [0, 1]; targets `(N,)`, int64."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Digits(NamedTuple):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, split 1197 / 300 / 300."""

    train: Rows
    val: Rows
    test: Rows


@pytest.fixture(scope="session")
def digits() -> Digits:
    """The digits in a fixed split. Do not write into the tensors: every test sees the same ones."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    targets = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    return Digits(*(Rows(inputs[part], targets[part]) for part in order.split([1197, 300, 300])))


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a Ray of one node, which this process is connected to; other processes join it by `RAY_ADDRESS`.

    One for the whole session, so do not shut it down, and leave no actors. Tests that kill nodes need a cluster of
    their own, in a process of their own.
    """
    ray = pytest.importorskip("ray")
    # The CPUs are only counted: actors of tests mostly wait.
    ray.init(
        address="local",
        num_cpus=16,
        object_store_memory=150 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="WARNING",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown(wait_for_processes=True)
