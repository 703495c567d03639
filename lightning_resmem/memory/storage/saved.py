"""What a saved memory says, checked before anything is made from it."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.metric import KeyMap, Metric
from lightning_resmem.memory.search import faiss_search
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.search.faiss_search import FaissSearch
from lightning_resmem.memory.storage import disk
from lightning_resmem.memory.storage.contents import check_contents
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import TASKS, Multiclass, Task

_log = logging.getLogger("lightning_resmem")

# What classes are stored as ends there.
_MOST_OUTPUTS = 2**31

# Params that older memories do not have: those of the default.
_LATER = ("gate", "combined_temperature")
# What the tensors of a map of the keys are called.
_MAP = {"mean": "map_mean", "matrix": "map_matrix"}


@dataclass(frozen=True)
class Saved:
    """A saved memory: what its manifest stands for, and the tensors of its rows.

    Attributes:
        files: The manifest as it was read, the tensors and the open files.
        task: What a residual is.
        params: How the memory is read.
        tunable: Whether the params were left to be measured or tuned.
        provenance: Where the rows come from.
        index: How neighbours are found.
        config: The kind of values.
        values: Values of that kind, without rows.
        key_map: Of keys and queries before they are compared, if there is one.
    """

    files: disk.Opened
    task: Task
    params: ResMemParams
    tunable: bool
    provenance: dict[str, str]
    index: str | FaissIndex
    config: DenseConfig | SparseConfig
    values: Values
    key_map: KeyMap | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Keys, ids, times if rows have any, and what `values` holds, by name; all of one length."""
        return self.files.tensors

    @property
    def metric(self) -> Metric:
        """In which space rows are near each other."""
        return "euclidean" if self.key_map is None else "within_class"

    @property
    def rows(self) -> dict[str, Tensor]:
        """Of the tensors those that this release knows."""
        names = {"keys", "ids", "times", *self.values.names}
        return {name: tensor for name, tensor in self.tensors.items() if name in names}

    def verify(self) -> None:
        """Check what mapping left out: checksums, and that the contents are possible.

        Raises:
            StorageError: If something is damaged.
        """
        self.files.verify()
        self.check_contents()

    def check_contents(self) -> None:
        """Raise an error for rows that cannot be, such as a label that is no class."""
        check_contents(self.files.path, self.task, self.values, self.tensors)


@contextmanager
def read_saved(directory: str | os.PathLike[str], mmap: bool = False) -> Iterator[Saved]:
    """Read a saved memory and check that its parts belong together.

    Args:
        directory: As given to `save`.
        mmap: Map the files into memory instead of reading them; their contents are not checked then.

    Raises:
        StorageError: If something is missing, damaged, impossible, or of another format version.
    """
    with disk.opened(directory, mmap) as files:
        saved = _understood(files)
        if not mmap:
            saved.check_contents()
        yield saved


def _understood(files: disk.Opened) -> Saved:
    """What the manifest stands for."""
    manifest, tensors = files.manifest, files.tensors
    entry = partial(disk.entry, files.path, manifest)
    name, rows, num_outputs = entry(str, "task"), entry(int, "rows"), entry(int, "values", "num_outputs")
    tunable, provenance = entry(bool, "tunable"), dict(entry(dict, "provenance"))
    for key in provenance:
        entry(str, "provenance", key)
    if num_outputs >= _MOST_OUTPUTS:  # of sparse values: no file has a row of them
        raise disk.damaged(files.path, f"values.num_outputs is {num_outputs}, at most {_MOST_OUTPUTS - 1} can be")
    for parameter in dataclasses.fields(ResMemParams):
        if parameter.name not in _LATER and parameter.name not in entry(dict, "params"):
            raise disk.damaged(files.path, f"params.{parameter.name} is missing")
    if name not in TASKS:
        raise disk.damaged(files.path, f"its task is {name!r}, this release knows {', '.join(TASKS)}")
    index: str | FaissIndex = "exact"
    config: DenseConfig | SparseConfig = DenseConfig()
    try:
        task, params = TASKS[name](), ResMemParams(**manifest["params"])
        if manifest.get("index") != "exact":
            index = FaissIndex(**entry(dict, "index"))
        if "top_m" in manifest["values"]:
            config = SparseConfig(entry(int, "values", "top_m"))
        values: Values = config.build(task, num_outputs)
    except (TypeError, ValueError) as error:
        raise disk.damaged(files.path, str(error).rstrip(".")) from error
    _check_tensors(files.path, rows, values, tensors)
    key_map = _read_map(files.path, tensors)
    return Saved(files, task, params, tunable, provenance, index, config, values, key_map)


def read_index(files: disk.Opened, keys: Tensor, config: FaissIndex) -> FaissSearch | None:
    """The index saved with a memory, or None, with a logged reason, if it has to be built again from the keys."""
    try:
        return faiss_search.load(*files.extra(faiss_search.FILE), keys, config)
    except StorageError as error:
        _log.warning("%s: it is built again from the keys.", error)
        return None


def manifest(
    task: Task,
    params: ResMemParams,
    tunable: bool,
    provenance: dict[str, str],
    rows: int,
    index: FaissIndex | FaissSearch | Literal["exact"],
    values: Values,
) -> dict[str, Any]:
    """What `read_saved` reads, for a memory of so many rows; arguments as the attributes of `Saved`."""
    wanted: dict[str, Any] | Literal["exact"] = "exact"
    if index != "exact":
        wanted = index.describe() if isinstance(index, FaissSearch) else dataclasses.asdict(index)
    return {
        "task": task.name,
        "params": dataclasses.asdict(params),
        "tunable": tunable,
        "rows": rows,
        "index": wanted,
        "values": values.describe(),
        "provenance": provenance,
    }


def map_tensors(key_map: KeyMap | None) -> dict[str, Tensor]:
    """What is saved of a map of the keys; old memories have none."""
    # In float64, which some devices do not have.
    return {} if key_map is None else {_MAP[name]: part.cpu().double() for name, part in key_map._asdict().items()}


def _read_map(directory: str | os.PathLike[str], tensors: dict[str, Tensor]) -> KeyMap | None:
    if not tensors.keys() & set(_MAP.values()):
        return None
    width = tensors["keys"].shape[1]
    for name, shape in zip(_MAP.values(), [(width,), (width, width)], strict=True):
        found = tensors.get(name)
        if found is None or found.shape != shape or found.dtype != torch.float64 or not bool(found.isfinite().all()):
            raise disk.damaged(directory, f"{name} is no map of keys of width {width}")
    return KeyMap(**{name: tensors[file] for name, file in _MAP.items()})


def _check_tensors(directory: str | os.PathLike[str], rows: int, values: Values, tensors: dict[str, Tensor]) -> None:
    """Raise an error unless all tensors are there, with the shapes that the manifest stands for."""
    names = ["keys", "ids", *values.names]
    missing = [f"tensors.{name}" for name in names if name not in tensors]
    if missing:
        raise disk.damaged(directory, f"{', '.join(missing)} is missing")
    dated = ["times"] if "times" in tensors else []
    lengths = {name: len(tensors[name]) for name in (*names, *dated)}
    if not rows or set(lengths.values()) != {rows}:
        raise StorageError(f"{directory} is damaged: the manifest says {rows} rows, the files hold {lengths}.")
    floats, whole = (torch.float32, torch.float16, torch.bfloat16), (torch.int64, torch.int32, torch.int16)
    labels = values.labels if isinstance(values.task, Multiclass) else ()
    wanted = {"keys": floats, "ids": whole[:1], **dict.fromkeys(dated, (torch.float64,))}
    for name, kinds in {**wanted, **dict.fromkeys(labels, whole)}.items():
        if tensors[name].dtype not in kinds:
            raise disk.damaged(directory, f"tensors.{name}.dtype is {tensors[name].dtype}")
    width = tensors["keys"].shape[-1]
    shapes = {"keys": (rows, width), "ids": (rows,), **dict.fromkeys(dated, (rows, 2))}
    for name, shape in {**shapes, **values.shapes(rows)}.items():
        if tensors[name].shape != shape:
            raise disk.damaged(
                directory,
                f"values.num_outputs is {values.num_outputs}, so {name} should have shape {shape}, the file holds "
                f"{tuple(tensors[name].shape)}",
            )
