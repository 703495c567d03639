"""Approximate search with FAISS, and the rule that says when it is worth it. FAISS is imported when it is used."""

import importlib.util
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError, ResMemError, ResMemWarning, StorageError
from lightning_resmem.memory.capacity import available_bytes
from lightning_resmem.memory.search.exact import ExactIndex, measure

_log = logging.getLogger("lightning_resmem")

FILE = "index.faiss"
# Keys handed to FAISS at a time: it may copy what it is given.
_ADD_ROWS = 65536
# Keys a quantizer is trained on, per cluster; FAISS wants at least 39 and uses at most 256.
_TRAIN_PER_CLUSTER = 64
_TRAIN_ROWS = 100_000
# Rows and neighbours that recall is measured with.
_RECALL_ROWS, _RECALL_K = 256, 10
# Recall below which an index whose recall nobody asked for is told of.
_LOW_RECALL = 0.9
_GPU_MAX_K = 2048
_GPU_TEMPORARY_BYTES = 256 * 2**20
# What an index may be described as.
_FACTORIES = 'a FAISS factory string such as "HNSW32" or "IVF1024,Flat"'
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
        InputError: If a number is out of its range, or FAISS is installed and does not understand `factory`, or such an
            index has no such setting.
    """

    factory: str
    nprobe: int | None = None
    ef_search: int | None = None
    rerank: int = 0
    min_recall: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("nprobe", 1), ("ef_search", 1), ("rerank", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value!r}: give a whole number of at least {least}.")
        if self.min_recall is not None and not 0 < self.min_recall <= 1:
            raise InputError(f"min_recall={self.min_recall!r}: give a share above 0 and at most 1, e.g. 0.95.")
        if not isinstance(self.factory, str):
            raise InputError(f"factory={self.factory!r}: give {_FACTORIES}.")
        if importlib.util.find_spec("faiss") is not None:  # without it `check` refuses, before anything is memorized
            _check_factory(self)


class FaissSearch:
    """An index built by FAISS over keys that stay in the memory.

    Args:
        keys: Shape `(N, D)`.
        config: What to build.
        loaded: A FAISS index of these keys, read from disk; nothing is trained then.
        trained: What `train` returned; by default the index is trained on these keys.

    Raises:
        InputError: If FAISS is not installed, does not know the factory string, or cannot use the keys' device.
    """

    name = "faiss"

    def __init__(
        self, keys: Tensor, config: FaissIndex, loaded: Any | None = None, trained: bytes | None = None
    ) -> None:
        self.keys, self.config = keys, config
        self.recall: float | None = None
        self._faiss = _import_faiss(config)
        self._process = os.getpid()
        _check_device(self._faiss, keys.device, config)
        self.index = self._filled(trained) if loaded is None else loaded
        self._searched = self._on_device()
        self._set("nprobe", config.nprobe)
        self._set("efSearch", config.ef_search)
        if loaded is None:
            self._reach_recall()

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if os.getpid() != self._process:
            raise ResMemError(
                "FAISS does not work in a forked process (its search would hang). Load the memory in the worker, or "
                'start workers with multiprocessing_context="spawn".'
            )
        fetched = min(len(self.keys), k * max(1, self.config.rerank))
        check_gpu_k(self.keys.device, fetched, self.config)
        self._faiss.omp_set_num_threads(torch.get_num_threads())  # FAISS keeps this per calling thread
        squared, found = self._searched.search(queries.detach().float().cpu().contiguous().numpy(), fetched)
        positions = torch.from_numpy(found).to(queries.device)
        if self.config.rerank:
            distances, positions = measure(self.keys, queries.detach().float(), positions)
            return distances[:, :k].contiguous(), positions[:, :k].contiguous()
        distances = torch.from_numpy(squared).to(queries.device).clamp_min_(0).sqrt_()
        return distances.masked_fill_(positions < 0, torch.inf), positions

    def save(self, file: Path) -> None:
        """Write FAISS's own file."""
        self._faiss.write_index(self.index, str(file))

    def settings(self) -> dict[str, int]:
        """The search parameters in force: `nprobe` or `ef_search`, where the index has them."""
        found = {}
        for name, parameter in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
            value = self._get(parameter)
            if value is not None:
                found[name] = value
        return found

    def _filled(self, trained: bytes | None) -> Any:
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        if trained is None:
            index = _trained(self._faiss, self.keys, self.config)
        else:
            index = self._faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        for chunk in self.keys.split(_ADD_ROWS):
            index.add(chunk.float().cpu().contiguous().numpy())
        return index

    def _on_device(self) -> Any:
        """The index to search: on the GPU of the keys, if they are on one."""
        if self.keys.device.type != "cuda":
            return self.index
        resources = self._faiss.StandardGpuResources()
        resources.setTempMemory(_GPU_TEMPORARY_BYTES)
        self._resources = resources  # FAISS keeps only a pointer to it
        try:
            moved = self._faiss.index_cpu_to_gpu(resources, self.keys.device.index or 0, self.index)
        except RuntimeError as error:
            raise InputError(
                f"index={self.config.factory!r} has no GPU version: {_reason(error)}. Keep the memory on the CPU, or "
                'use index="exact", which runs on any device.'
            ) from error
        sample = self.keys[: min(64, len(self.keys))].float().cpu().numpy()
        k = min(_RECALL_K, len(self.keys))
        there, here = moved.search(sample, k)[0], self.index.search(sample, k)[0]
        if not np.allclose(there, here, rtol=1e-2, atol=1e-3 * max(1.0, float(np.abs(here).max()))):
            raise ResMemError(
                f"FAISS finds other distances on {self.keys.device} than on the CPU (off by up to "
                f"{np.abs(there - here).max():.3g}): this build of faiss-gpu does not work on this machine. "
                'Use index="exact".'
            )
        return moved

    def _reach_recall(self) -> None:
        """Measure recall, and raise the search effort until it is as wanted or the effort is at its limit."""
        rows = min(_RECALL_ROWS, len(self.keys))
        chosen = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(1))[:rows]
        # A stored row finds itself, which says nothing: one more is asked for, and one not counted.
        queries, k = self.keys[chosen.to(self.keys.device)].float(), min(_RECALL_K, len(self.keys) - 1)
        farthest = ExactIndex(self.keys).search(queries, k + 1)[0][:, -1:]
        # By distance rather than by position: any of several equally near rows is right.
        tolerance = 1e-5 * farthest + 1e-3 * farthest.mean() * 1e-2

        def recall() -> float:
            _, positions = self.search(queries, k + 1)
            distances, _ = measure(self.keys, queries, positions)
            found = (distances <= farthest + tolerance).sum(dim=1) - 1
            return float((found.clamp_min(0) / max(1, k)).mean()) if k else 1.0

        self.recall = recall()
        wanted = self.config.min_recall
        parameter = "nprobe" if self._get("nprobe") is not None else "efSearch"
        limit = _lists(self._faiss, self.index) if parameter == "nprobe" else min(len(self.keys), 4096)
        effort = self._get(parameter)
        while wanted is not None and self.recall < wanted and effort is not None and effort < limit:
            effort = min(2 * effort, limit)
            self._set(parameter, effort)
            self.recall = recall()
        short = wanted is not None and self.recall < wanted
        _log.log(
            logging.WARNING if short else logging.INFO,
            "index %s: recall@%d %.3f on %d rows%s%s",
            self.config.factory,
            k,
            self.recall,
            rows,
            "" if effort is None else f" with {parameter} {effort}",
            f", below min_recall={wanted}: it compresses keys (try rerank=4) or cannot do better" if short else "",
        )
        if wanted is None and self.recall < _LOW_RECALL:
            argument = {"nprobe": "nprobe", "efSearch": "ef_search"}[parameter]
            way = "rerank=4" if effort is None or effort >= limit else "min_recall=0.95"
            larger = "" if way == "rerank=4" else f", or a larger {argument}="
            setting = "" if effort is None else f" with {argument}={effort}"
            warnings.warn(
                f"index={self.config.factory!r} finds a share of only {self.recall:.3f} of the {k} nearest rows"
                f'{setting}: give index=FaissIndex("{self.config.factory}", {way}){larger}.',
                ResMemWarning,
                stacklevel=2,
            )

    def _get(self, parameter: str) -> int | None:
        return _effort(self._faiss, self._searched, parameter)

    def _set(self, parameter: str, value: int | None) -> None:
        if value is None:
            return
        space = self._faiss.GpuParameterSpace() if self._searched is not self.index else self._faiss.ParameterSpace()
        space.set_index_parameter(self._searched, parameter, value)


def train(keys: Tensor, config: FaissIndex) -> bytes:
    """A trained index without keys, for the `FaissSearch` of several memories with the same centroids.

    Args:
        keys: A random sample of all keys, shape `(n, D)`; see `sample_size`.
        config: What to train.

    Raises:
        InputError: As for `FaissSearch`.
    """
    faiss = _import_faiss(config)
    return bytes(faiss.serialize_index(_trained(faiss, keys, config)))


def sample_size(width: int, config: FaissIndex) -> int:
    """How many keys of width `D` an index is trained on, 0 if it needs no training."""
    faiss = _import_faiss(config)
    index = _made(faiss, width, config)
    return 0 if index.is_trained else max(_TRAIN_ROWS, _TRAIN_PER_CLUSTER * _lists(faiss, index))


def _trained(faiss: ModuleType, keys: Tensor, config: FaissIndex) -> Any:
    index = _made(faiss, keys.shape[1], config)
    if not index.is_trained:
        # A random sample: rows in the order of the training set may be sorted by class.
        count = min(len(keys), max(_TRAIN_ROWS, _TRAIN_PER_CLUSTER * _lists(faiss, index)))
        chosen = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:count].sort().values
        try:
            index.train(keys[chosen.to(keys.device)].float().cpu().numpy())
        except RuntimeError as error:
            raise InputError(
                f"index={config.factory!r} cannot be trained on {count} keys: {_reason(error)}. Use fewer "
                'clusters, or index="exact".'
            ) from error
    return index


def _made(faiss: ModuleType, width: int, config: FaissIndex) -> Any:
    try:
        index = faiss.index_factory(width, config.factory)
    except RuntimeError as error:
        raise InputError(
            f"index={config.factory!r} cannot be built for keys of width {width}: "
            f'{_reason(error)}. Give "auto", "exact" or {_FACTORIES}.'
        ) from error
    _check_settings(faiss, index, config)
    return index


def check(config: FaissIndex, rows: int | None, width: int, device: torch.device) -> None:
    """Raise an error for an index that cannot be built.

    Args:
        config: What is to be built.
        rows: `N`, None if it is not known yet.
        width: `D`.
        device: Where the keys will be.

    Raises:
        InputError: As for `FaissSearch`, or if there are fewer rows than lists to train.
    """
    faiss = _import_faiss(config)
    _check_device(faiss, device, config)
    inverted = faiss.try_extract_index_ivf(_made(faiss, width, config))
    # The lists of a multi-index (IMI2x8) come of a product of quantizers, which few rows suffice to train.
    if rows is not None and inverted is not None and inverted.quantizer_trains_alone != "\1" and rows < inverted.nlist:
        raise InputError(
            f"index={config.factory!r} has {inverted.nlist} lists, and there are only {rows} rows to train them on: "
            'use fewer lists, or index="exact".'
        )


def _check_factory(config: FaissIndex) -> None:
    """Raise an error for a factory string or a setting that does not work for keys of any width."""
    faiss = _import_faiss(config)
    try:
        _check_settings(faiss, faiss.index_factory(_ANY_WIDTH, config.factory), config)
    except RuntimeError as error:
        if "could not parse" in str(error):  # other errors may come of the width
            raise InputError(
                f'index={config.factory!r} is not understood: give "auto", "exact" or {_FACTORIES}.'
            ) from error


def _check_settings(faiss: ModuleType, index: Any, config: FaissIndex) -> None:
    for argument, parameter in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
        value = getattr(config, argument)
        if value is not None and _effort(faiss, index, parameter) is None:
            raise InputError(f"{argument}={value} does nothing for index={config.factory!r}: leave it out.")


def _effort(faiss: ModuleType, index: Any, parameter: str) -> int | None:
    """The search parameter `nprobe` or `efSearch` of an index, None if it has no such one."""
    if parameter == "nprobe":
        inverted = faiss.try_extract_index_ivf(index)
        return None if inverted is None else int(inverted.nprobe)
    graph = getattr(faiss.downcast_index(index), "hnsw", None)
    return None if graph is None else int(graph.efSearch)


def _lists(faiss: ModuleType, index: Any) -> int:
    inverted = faiss.try_extract_index_ivf(index)
    return int(inverted.nlist) if inverted is not None else 0


def choose(
    rows: int, width: int, device: torch.device, free_bytes: int, installed: bool
) -> tuple[FaissIndex | None, str]:
    """The rule of `index="auto"`.

    Args:
        rows: `N`.
        width: `D`.
        device: Where the keys are.
        free_bytes: Memory of the machine that nobody uses.
        installed: Whether FAISS is.

    Returns:
        What to build, None for exact search, and the reason.

    Example:
        >>> choose(45_000, 64, torch.device("cpu"), 2**34, installed=True)
        (None, 'exact: 45000 x 64 keys are searched in milliseconds')
    """
    if device.type != "cpu":
        return None, f"exact: the keys are on {device}, where all of them are compared quickly"
    if rows * width <= _EXACT_WORK:
        return None, f"exact: {rows} x {width} keys are searched in milliseconds"
    if not installed:
        return None, f"exact: {rows} x {width} keys take long to search, but faiss-cpu is not installed"
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
    installed = importlib.util.find_spec("faiss") is not None
    config, reason = choose(keys.shape[0], keys.shape[1], keys.device, available_bytes() or 0, installed)
    slow = config is None and keys.device.type == "cpu" and keys.numel() > _EXACT_WORK
    _log.log(logging.WARNING if slow else logging.INFO, 'index="auto" chose %s', reason)
    return config


def check_gpu_k(device: torch.device, k: int, config: FaissIndex) -> None:
    """Raise an error if FAISS cannot find that many neighbours on the device."""
    if device.type == "cuda" and k > _GPU_MAX_K:
        raise InputError(
            f"k={k} (times rerank) is more than the {_GPU_MAX_K} neighbours that FAISS finds on a GPU, with "
            f'index={config.factory!r}: use a smaller k, index="exact", or keep the memory on the CPU.'
        )


def load(file: Path, keys: Tensor, config: FaissIndex) -> FaissSearch:
    """The index of these keys that `FaissSearch.save` wrote.

    Raises:
        StorageError: If the file cannot be read, or holds other keys.
    """
    try:
        loaded = _import_faiss(config).read_index(str(file))
    except RuntimeError as error:
        raise StorageError(f"{file} cannot be read ({_reason(error)})") from error
    if (loaded.ntotal, loaded.d) != tuple(keys.shape):
        raise StorageError(f"{file} holds {loaded.ntotal} x {loaded.d} keys, the memory {tuple(keys.shape)}")
    return FaissSearch(keys, config, loaded)


def _import_faiss(config: FaissIndex) -> ModuleType:
    try:
        import faiss  # after torch, which this module imported: the other order breaks GPU results (faiss #2126)
    except ModuleNotFoundError as error:
        raise InputError(
            f'index={config.factory!r} needs FAISS: pip install "lightning-resmem[cpu]" (or [gpu]; never both), or use '
            'index="exact".'
        ) from error
    module: ModuleType = faiss
    return module


def _check_device(faiss: ModuleType, device: torch.device, config: FaissIndex) -> None:
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise InputError(f'index={config.factory!r} does not run on {device}: use index="exact", which does.')
    if not hasattr(faiss, "StandardGpuResources"):
        raise InputError(
            f'index={config.factory!r} on {device} needs faiss-gpu (pip install "lightning-resmem[gpu]", after '
            'uninstalling faiss-cpu). Or keep the memory on the CPU, or use index="exact".'
        )


def _reason(error: RuntimeError) -> str:
    """The last line of a FAISS error, without the C++ function it came from."""
    return str(error).strip().splitlines()[-1].split("Error: ")[-1].rstrip(".")
