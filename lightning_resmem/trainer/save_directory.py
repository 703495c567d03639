"""Where a callback saves its memory (where the user says, or beside checkpoints), and what a save may replace."""

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_resmem.errors import InputError, ResMemWarning, StorageError
from lightning_resmem.memory.storage import disk
from lightning_resmem.trainer.limits import is_fast_dev_run
from lightning_resmem.trainer.processes import runs_elsewhere


@dataclass(frozen=True)
class SaveDirectory:
    """The rule by which a memory's directory is chosen.

    Args:
        dirpath: The user's choice, or None.
        name: Of the callback, and of the directory where the user chose none.

    Raises:
        InputError: If one of them cannot be used.
    """

    dirpath: str | Path | None
    name: str
    # Under spawn and fork nothing comes back to this process; the others find this name in their copy, too.
    _token: str = field(default_factory=lambda: uuid.uuid4().hex[:8], init=False)

    def __post_init__(self) -> None:
        name, dirpath = self.name, self.dirpath
        if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
            raise InputError(f"name={name!r}: give a plain name, it also names a directory.")
        if dirpath is not None and (not isinstance(dirpath, (str, os.PathLike)) or not os.fspath(dirpath)):
            raise InputError(f"dirpath={dirpath!r} is not a path: give a directory for the memory, or None.")

    def find(self, trainer: L.Trainer) -> Path | disk.Url | None:
        """Where a memory of this trainer is saved, None if nowhere."""
        if self.dirpath is not None:
            return disk.as_path(self.dirpath)
        if runs_elsewhere(trainer):
            # The only way back to the main process, which does not know the log_dir of the others.
            return disk.as_path(trainer.default_root_dir) / f"{self.name}-{self._token}"
        if is_fast_dev_run(trainer) or not any(isinstance(c, ModelCheckpoint) for c in trainer.callbacks):  # type: ignore[attr-defined]
            return None
        dirpath = trainer.checkpoint_callback.dirpath  # type: ignore[union-attr]
        if dirpath is None:
            return disk.as_path(trainer.default_root_dir) / self.name
        checkpoints = disk.as_path(dirpath)  # relative where the logger's directory is: TensorBoardLogger("logs")
        return (checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints) / self.name

    def find_free(self, trainer: L.Trainer) -> Path | disk.Url | None:
        """Where to save without replacing the memory of another run, as checkpoints get a version then, too."""
        directory = self.find(trainer)
        if directory is None or self.dirpath is not None or self._token in directory.name:
            return directory
        versions = (directory.with_name(f"{directory.name}-v{version}") for version in count(1))
        return next(free for free in chain([directory], versions) if not free.exists())


def kind(base: L.LightningModule) -> str:
    """What a model is, for a memory's provenance: weights change with each fit, this does not."""
    return f"{type(base).__module__}.{type(base).__qualname__}"


def check_replaceable(directory: str | os.PathLike[str], provenance: Mapping[str, str]) -> None:
    """Refuse to replace the memory of other weights: nobody has said so.

    Raises:
        StorageError: If there is such a memory, or one that cannot be read.
    """
    found = _provenance(directory)
    if found and "fingerprint" in found and found["fingerprint"] != provenance.get("fingerprint"):
        raise StorageError(
            f"{disk.as_path(directory)} holds a memory of other weights ({found['fingerprint'][:12]}, these are "
            f"{provenance.get('fingerprint', 'not known')[:12]}): it is left as it is. Name another directory, or give "
            "overwrite=True to replace it."
        )


def check_own(directory: str | os.PathLike[str], base: L.LightningModule, way_out: str) -> None:
    """Before a fit: refuse to replace another model's memory, and say so if it is of the same model.

    Raises:
        StorageError: If a memory there was filled by a model of another class.
    """
    found = _provenance(directory)
    if not found or "fingerprint" not in found:
        return
    if found.get("base", kind(base)) != kind(base):
        raise StorageError(
            f"{disk.as_path(directory)} holds the memory of another model, {found['base']}, and this one is "
            f"{kind(base)}: it is left as it is. {way_out}"
        )
    rank_zero_warn(
        f"{disk.as_path(directory)} holds a memory of other weights ({found['fingerprint'][:12]}), which is replaced "
        f"when training ends. {way_out}",
        category=ResMemWarning,
    )


def _provenance(directory: str | os.PathLike[str]) -> Mapping[str, str] | None:
    """Where the rows of a saved memory come from, None if there is none."""
    if not (disk.as_path(directory) / disk.MANIFEST).is_file():
        return None
    found = disk.read_manifest(directory).get("provenance")
    return found if isinstance(found, dict) else {}
