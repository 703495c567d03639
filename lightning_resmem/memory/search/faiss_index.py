"""Which FAISS index is built, what it is refused for, and the rule of `index="auto"`. `faiss_search` searches it."""

import importlib.util
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.capacity import available_bytes
from lightning_resmem.memory.search.faiss_gpu import check_gpu
from lightning_resmem.memory.search.faiss_limits import FACTORIES, check_bounds, check_size

_log = logging.getLogger("lightning_resmem")

_GPU_MAX_K = 2048
# A width that nearly all descriptions fit.
_ANY_WIDTH = 64
# Multiplications of one query (rows x width) up to which a CPU searches exactly: some 20 ms on one core.
_EXACT_WORK = 2**30


@dataclass(frozen=True)
class FaissIndex:
    """A FAISS index, for `LocalMemory(index=...)`; a plain string is short for `FaissIndex(factory)`.

    Args:
        factory: FAISS's description, e.g. `"HNSW32"`, `"IVF4096,Flat"` or `"OPQ32,IVF4096,PQ32"`.
        nprobe: For IVF: how many of the lists are read for a query.
        ef_search: For HNSW: how many candidates are followed for a query.
        rerank: If above 0, `rerank * k` candidates are fetched and measured exactly with the stored keys. Worth it
            where FAISS compresses keys (PQ, SQ), whose distances are approximate otherwise.
        min_recall: If given, `nprobe` or `ef_search` is raised when the memory is built until this share of the 10
            nearest rows is found, measured on 256 stored rows.

    Raises:
        InputError: If a number is out of its range, also one in `factory`; or FAISS is installed and does not
            understand `factory`, or such an index has no such setting.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(index=FaissIndex("IVF4096,Flat", min_recall=0.95))
    """

    factory: str
    nprobe: int | None = None
    ef_search: int | None = None
    rerank: int = 0
    min_recall: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("nprobe", 1), ("ef_search", 1), ("rerank", 0)):
            value = getattr(self, name)
            if (value is not None or name == "rerank") and not (type(value) is int and least <= value < 2**31):
                raise InputError(f"{name}={value!r}: give a whole number of at least {least}, below 2**31.")
        if self.min_recall is not None and not 0 < self.min_recall <= 1:
            raise InputError(f"min_recall={self.min_recall!r}: give a share above 0 and at most 1, e.g. 0.95.")
        if not isinstance(self.factory, str):
            raise InputError(f"factory={self.factory!r}: give {FACTORIES}.")
        check_bounds(self.factory)
        if importlib.util.find_spec("faiss") is not None:  # without it `check` refuses, before anything is memorized
            _check_factory(self)


def check(config: FaissIndex, rows: int | None, width: int, device: torch.device) -> None:
    """Raise an error for an index that cannot be built.

    Args:
        config: What is to be built.
        rows: `N`, None if it is not known yet.
        width: `D`.
        device: Where the keys will be.

    Raises:
        InputError: As for `FaissSearch`, if there are fewer rows than lists or codebooks take to train, or if keys are
            narrower than `PCA` is to make them.
    """
    faiss = import_faiss(config)
    check_device(faiss, device, config)
    index = make_index(faiss, width, config)
    inverted = faiss.try_extract_index_ivf(index)
    # The lists of a multi-index (IMI2x8) come of a product of quantizers, which few rows suffice to train.
    if rows is not None and inverted is not None and inverted.quantizer_trains_alone != "\1" and rows < inverted.nlist:
        raise InputError(
            f"index={config.factory!r} has {inverted.nlist} lists, and there are only {rows} rows to train them on: "
            'use fewer lists, or index="exact".'
        )
    check_size(config.factory, rows, width)


def train_index(index: Any, keys: Any, config: FaissIndex) -> None:
    """Train an index of FAISS on keys `(n, D)`, a float32 array; raises an error that says why it cannot be."""
    try:
        index.train(keys)
    except RuntimeError as error:
        raise InputError(
            f"index={config.factory!r} cannot be trained on {len(keys)} keys of width {keys.shape[1]}: "
            f'{reason_of(error)}. Use fewer clusters, or index="exact".'
        ) from error


def check_gpu_k(device: torch.device, k: int, config: FaissIndex) -> None:
    """Raise an error if FAISS cannot find that many neighbours on the device."""
    if device.type == "cuda" and k > _GPU_MAX_K:
        raise InputError(
            f"k={k} (times rerank) is more than the {_GPU_MAX_K} neighbours that FAISS finds on a GPU, with "
            f'index={config.factory!r}: use a smaller k, index="exact", or keep the memory on the CPU.'
        )


def check_device(faiss: ModuleType, device: torch.device, config: FaissIndex) -> None:
    """Raise an error if this FAISS cannot use keys on the device."""
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise InputError(f'index={config.factory!r} does not run on {device}: use index="exact", which does.')
    if not hasattr(faiss, "StandardGpuResources"):
        raise InputError(
            f'index={config.factory!r} on {device} needs faiss-gpu (pip install "lightning-resmem[gpu]", after '
            'uninstalling faiss-cpu). Or keep the memory on the CPU, or use index="exact".'
        )
    check_gpu(device, config.factory)


def choose(
    rows: int, width: int, device: torch.device, free_bytes: int, installed: bool
) -> tuple[FaissIndex | None, str]:
    """The rule of `index="auto"`.

    Args:
        rows: `N`.
        width: `D`.
        device: Where the keys are.
        free_bytes: Memory of the machine that nobody uses.
        installed: Whether FAISS is, and works.

    Returns:
        What to build, None for exact search, and the reason.

    Examples:
        >>> choose(45_000, 64, torch.device("cpu"), 2**34, installed=True)
        (None, 'exact: 45000 x 64 keys are searched in milliseconds')
    """
    if device.type != "cpu":
        return None, f"exact: the keys are on {device}, where all of them are compared quickly"
    if rows * width <= _EXACT_WORK:
        return None, f"exact: {rows} x {width} keys are searched in milliseconds"
    if not installed:
        return None, f"exact: {rows} x {width} keys take long to search, and there is no FAISS (faiss-cpu)"
    lists = 2 ** round(np.log2(4 * rows**0.5))
    copied = 4 * rows * width
    if free_bytes > 1.25 * copied:
        return FaissIndex(
            f"IVF{lists},Flat", min_recall=0.95
        ), f"IVF{lists},Flat: {rows} x {width} keys, and room to copy"
    return (
        FaissIndex(f"IVF{lists},SQ8", rerank=4, min_recall=0.95),
        f"IVF{lists},SQ8: {rows} x {width} keys, and {free_bytes / 2**30:.1f} GiB is no room for a full copy",
    )


def choose_here(keys: Tensor) -> FaissIndex | None:
    """`choose` for these keys on this machine; the reason is logged."""
    many = keys.device.type == "cpu" and keys.numel() > _EXACT_WORK
    installed = many and is_usable()
    config, reason = choose(keys.shape[0], keys.shape[1], keys.device, available_bytes() or 0, installed)
    slow = config is None and many
    _log.log(logging.WARNING if slow else logging.INFO, 'index="auto" chose %s', reason)
    return config


def is_usable() -> bool:
    """Whether FAISS is installed and works; what keeps an installed one from it is logged."""
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError:
        return False
    except Exception as error:  # whatever its libraries raise: OSError, RuntimeError, ImportError
        _log.warning("FAISS is installed and does not work here (%s: %s).", type(error).__name__, error)
        return False
    return True


def import_faiss(config: FaissIndex) -> ModuleType:
    """FAISS; raises an error that says how to install it, or what keeps it from working, for an index that needs it."""
    try:
        import faiss  # after torch, which this module imported: the other order breaks GPU results (faiss #2126)
    except ModuleNotFoundError as error:
        raise InputError(
            f'index={config.factory!r} needs FAISS: pip install "lightning-resmem[cpu]" (or [gpu]; never both), or use '
            'index="exact".'
        ) from error
    except Exception as error:  # as above
        raise InputError(
            f"index={config.factory!r} needs FAISS, which is installed and does not work here "
            f"({type(error).__name__}: {error}). faiss-gpu needs the libraries of CUDA 12 (pip install "
            "nvidia-cuda-runtime-cu12 nvidia-cublas-cu12 nvidia-curand-cu12); without a GPU uninstall it and pip "
            'install "lightning-resmem[cpu]"; or use index="exact".'
        ) from error
    module: ModuleType = faiss
    return module


def make_index(faiss: ModuleType, width: int, config: FaissIndex) -> Any:
    """An index of FAISS for keys of width `D`, not yet trained and without keys."""
    try:
        index = faiss.index_factory(width, config.factory)
    except RuntimeError as error:
        raise InputError(
            f"index={config.factory!r} cannot be built for keys of width {width}: "
            f'{reason_of(error)}. Give "auto", "exact" or {FACTORIES}.'
        ) from error
    _check_settings(faiss, index, config)
    return index


def _check_factory(config: FaissIndex) -> None:
    """Raise an error for a factory string or a setting that does not work for keys of any width."""
    faiss = import_faiss(config)
    try:
        _check_settings(faiss, faiss.index_factory(_ANY_WIDTH, config.factory), config)
    except RuntimeError as error:
        if "could not parse" in str(error):  # other errors may come of the width
            raise InputError(
                f'index={config.factory!r} is not understood: give "auto", "exact" or {FACTORIES}.'
            ) from error


def _check_settings(faiss: ModuleType, index: Any, config: FaissIndex) -> None:
    for argument, parameter in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
        value = getattr(config, argument)
        if value is not None and effort_of(faiss, index, parameter) is None:
            raise InputError(f"{argument}={value} does nothing for index={config.factory!r}: leave it out.")


def effort_of(faiss: ModuleType, index: Any, parameter: str) -> int | None:
    """The search parameter `nprobe` or `efSearch` of an index, None if it has no such one."""
    if parameter == "nprobe":
        inverted = faiss.try_extract_index_ivf(index)
        return None if inverted is None else int(inverted.nprobe)
    graph = getattr(faiss.downcast_index(index), "hnsw", None)
    return None if graph is None else int(graph.efSearch)


def holds_keys(faiss: ModuleType, index: Any) -> bool:
    """Whether an index holds the keys as they are, and returns their squared Euclidean distances."""
    kinds = (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexIVFFlat, faiss.IndexHNSWFlat)
    return type(faiss.downcast_index(index)) in kinds and index.metric_type == faiss.METRIC_L2


def lists_of(faiss: ModuleType, index: Any) -> int:
    """The number of lists of an inverted index, 0 if it is none."""
    inverted = faiss.try_extract_index_ivf(index)
    return int(inverted.nlist) if inverted is not None else 0


def reason_of(error: RuntimeError) -> str:
    """The last line of a FAISS error, without the C++ function it came from."""
    return str(error).strip().splitlines()[-1].split("Error: ")[-1].rstrip(".")
