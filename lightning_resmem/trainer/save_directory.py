"""Where a callback saves its memory: where the user says, or beside the trainer's checkpoints."""

import os
import uuid
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_resmem.errors import InputError
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
