"""Approximate search with FAISS, which is imported when it is used."""

import dataclasses
import logging
import os
import warnings
from contextlib import nullcontext
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError, ResMemError, ResMemWarning, StorageError
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.memory.search.faiss_index import (
    FaissIndex,
    check_device,
    check_gpu_k,
    effort_of,
    holds_keys,
    import_faiss,
    lists_of,
    make_index,
    reason_of,
    train_index,
)
from lightning_resmem.memory.search.faiss_limits import check_nsg
from lightning_resmem.memory.search.measuring import largest_number, measure
from lightning_resmem.memory.search.precise import ORDINARY
from lightning_resmem.tasks import check_finite
from lightning_resmem.together import Lock

_log = logging.getLogger("lightning_resmem")

FILE = "index.faiss"
# Bytes of a saved index that FAISS asks for at a time.
_READ_BYTES = 2**20
# Keys handed to FAISS at a time: it may copy what it is given.
_ADD_ROWS = 65536
# Keys a quantizer is trained on, per cluster; FAISS wants at least 39 and uses at most 256.
_TRAIN_PER_CLUSTER = 64
_TRAIN_ROWS = 100_000
# Rows and neighbours that recall is measured with.
_RECALL_ROWS, _RECALL_K = 256, 10
# Recall below which an index whose recall nobody asked for is told of.
_LOW_RECALL = 0.9
_GPU_TEMPORARY_BYTES = 256 * 2**20


class FaissSearch:
    """An index built by FAISS over keys that stay in the memory.

    Distances are Euclidean in the space of the keys: what FAISS says is taken from an index that holds the keys as they
    are, and measured again with the keys otherwise. A query so far away that FAISS's squares would overflow is compared
    with all keys.

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
        self._faiss = import_faiss(config)
        self._process = os.getpid()
        # GPU indexes have temporary memory that searches share.
        self._searching = Lock() if keys.device.type == "cuda" else nullcontext()
        check_device(self._faiss, keys.device, config)
        self.index = self._filled(trained) if loaded is None else loaded
        self._measures = config.rerank > 0 or not holds_keys(self._faiss, self.index)
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
        queries = queries.detach().float()
        far = ~(queries.abs().amax(dim=1) < ORDINARY[1])
        if bool(far.any()):
            check_finite("queries", queries)
            near = (~far).nonzero()[:, 0]
            distances, positions = queries.new_empty(len(queries), k), near.new_empty(len(queries), k)
            distances[far], positions[far] = self._exact.search(queries[far], k)
            distances[near], positions[near] = self._search(queries[near], k, fetched)
            return distances, positions
        return self._search(queries, k, fetched)

    @cached_property
    def _exact(self) -> ExactIndex:
        return ExactIndex(self.keys, half_copy=False)  # for few queries: no copy is worth it

    def _search(self, queries: Tensor, k: int, fetched: int) -> tuple[Tensor, Tensor]:
        """The `k` nearest of `fetched` keys that FAISS finds."""
        self._faiss.omp_set_num_threads(torch.get_num_threads())  # FAISS keeps this per calling thread
        with self._searching:
            squared, found = self._searched.search(queries.cpu().contiguous().numpy(), fetched)
        positions = torch.from_numpy(found).to(queries.device)
        if self._measures:
            distances, positions = measure(self.keys, queries, positions)
            return distances[:, :k].contiguous(), positions[:, :k].contiguous()
        distances = torch.from_numpy(squared).to(queries.device).clamp_min_(0).sqrt_()
        return distances.masked_fill_(positions < 0, torch.inf), positions

    def save(self, file: Path) -> None:
        """Write FAISS's own file."""
        try:
            self._faiss.write_index(self.index, str(file))
        except RuntimeError as error:
            raise OSError(f"FAISS could not write its index: {reason_of(error)}") from error

    def packed(self) -> tuple[FaissIndex, bytes, float | None]:
        """What `unpacked` makes the same index of, in this process or another."""
        return FaissIndex(**self.describe()), bytes(self._faiss.serialize_index(self.index)), self.recall

    @classmethod
    def unpacked(cls, keys: Tensor, config: FaissIndex, packed: bytes, recall: float | None) -> "FaissSearch":
        """The index of these keys that was packed."""
        index = cls(keys, config, import_faiss(config).deserialize_index(np.frombuffer(packed, np.uint8)))
        index.recall = recall
        return index

    def describe(self) -> dict[str, Any]:
        """What to build, with the search parameters in force: as a `FaissIndex` takes it."""
        return {**dataclasses.asdict(self.config), **self.settings()}

    def settings(self) -> dict[str, int]:
        """The search parameters in force: `nprobe` or `ef_search`, where the index has them."""
        found = {}
        for name, parameter in (("nprobe", "nprobe"), ("ef_search", "efSearch")):
            value = self._get(parameter)
            if value is not None:
                found[name] = value
        return found

    def _filled(self, trained: bytes | None) -> Any:
        check_nsg(self.config.factory, len(self.keys))
        self._faiss.omp_set_num_threads(torch.get_num_threads())
        if trained is None:
            index = _trained(self._faiss, self.keys, self.config)
        else:
            index = self._faiss.deserialize_index(np.frombuffer(trained, np.uint8))
        for chunk in self.keys.split(_ADD_ROWS):
            self._add(index, chunk.float().cpu().contiguous().numpy())
        return index

    def _add(self, index: Any, keys: Any) -> None:
        try:
            index.add(keys)
        except RuntimeError as error:
            raise InputError(
                f"index={self.config.factory!r} cannot be built of {len(self.keys)} keys: {reason_of(error)}. Give "
                'another index, or index="exact".'
            ) from error

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
                f"index={self.config.factory!r} has no GPU version: {reason_of(error)}. Keep the memory on the CPU, or "
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
        farthest = ExactIndex(self.keys, half_copy=False).search(queries, k + 1)[0][:, -1:]
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
        limit = lists_of(self._faiss, self.index) if parameter == "nprobe" else min(len(self.keys), 4096)
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
        return effort_of(self._faiss, self._searched, parameter)

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
    faiss = import_faiss(config)
    return bytes(faiss.serialize_index(_trained(faiss, keys, config)))


def sample_size(width: int, config: FaissIndex) -> int:
    """How many keys of width `D` an index is trained on, 0 if it needs no training."""
    faiss = import_faiss(config)
    index = make_index(faiss, width, config)
    return 0 if index.is_trained else max(_TRAIN_ROWS, _TRAIN_PER_CLUSTER * lists_of(faiss, index))


def _trained(faiss: ModuleType, keys: Tensor, config: FaissIndex) -> Any:
    index = make_index(faiss, keys.shape[1], config)
    if not index.is_trained:
        # A random sample: rows in the order of the training set may be sorted by class.
        count = min(len(keys), max(_TRAIN_ROWS, _TRAIN_PER_CLUSTER * lists_of(faiss, index)))
        chosen = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))[:count].sort().values
        train_index(index, keys[chosen.to(keys.device)].float().cpu().numpy(), config)
    return index


def new_search(keys: Tensor, config: FaissIndex, trained: bytes | None) -> FaissSearch | ExactIndex:
    """`FaissSearch`, or, with a warning, exact search of keys whose squares FAISS cannot hold."""
    largest = largest_number(keys)
    if not largest or ORDINARY[0] < largest < ORDINARY[1]:
        return FaissSearch(keys, config, trained=trained)
    warnings.warn(
        f"index={config.factory!r} cannot compare keys whose largest number is {largest:.3g}, as FAISS squares them in "
        f"float32: all keys are compared instead, exactly. Bring embeddings between {ORDINARY[0]:.0e} and "
        f"{ORDINARY[1]:.0e} for FAISS.",
        ResMemWarning,
        stacklevel=2,
    )
    return ExactIndex(keys)


def load(stream: FileIO, file: Path, keys: Tensor, config: FaissIndex) -> FaissSearch:
    """The index of these keys that `FaissSearch.save` wrote to a file, which is open.

    Raises:
        StorageError: If the file cannot be read, or holds other keys.
    """
    faiss = import_faiss(config)
    try:
        loaded = faiss.read_index(faiss.PyCallbackIOReader(stream.read, _READ_BYTES))
    except RuntimeError as error:
        raise StorageError(f"{file} cannot be read ({reason_of(error)})") from error
    if (loaded.ntotal, loaded.d) != tuple(keys.shape):
        raise StorageError(f"{file} holds {loaded.ntotal} x {loaded.d} keys, the memory {tuple(keys.shape)}")
    return FaissSearch(keys, config, loaded)
