"""How a memory is found again where it was saved: by the path in a checkpoint, or after spawn and fork."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_resmem.cluster.memory import RayMemory
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import StorageError
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage import disk
from lightning_resmem.progress import shows_progress, working
from lightning_resmem.trainer.processes import runs_elsewhere
from lightning_resmem.trainer.save_directory import SaveDirectory, check_own


class RestorableMemory:
    """The memory of a callback, which is read from where it was saved when this process does not have it.

    Args:
        memory: Filled, or to be filled; None is a `LocalMemory`. What is read is spread over a cluster as a `RayMemory`
            was to be, else it is a `LocalMemory`.
        place: Says where it is saved.

    Attributes:
        memory: The memory; without rows as long as none were needed.
        directory: Where it was saved, or None.
    """

    def __init__(self, memory: ResidualMemory | None, place: SaveDirectory) -> None:
        self.memory: ResidualMemory = LocalMemory() if memory is None else memory
        check_memory(self.memory)
        self.directory: Path | disk.Url | None = None
        self._place = place
        self._like = self.memory if isinstance(self.memory, RayMemory) else None

    def check_target(self, trainer: L.Trainer) -> None:
        """Find out before training whether the memory can be saved afterwards.

        Raises:
            StorageError: If something else is in its place, another model's memory included.
        """
        directory = self._place.find(trainer)
        with Ranks(trainer).together("looking where the memory will be saved"):
            if directory is not None and trainer.is_global_zero:
                disk.try_target(directory)
                if self._place.dirpath is not None and directory != self.directory:  # which was saved by this callback
                    check_own(directory, trainer.lightning_module, "To keep it, give another dirpath or move it.")

    def save(self, trainer: L.Trainer) -> None:
        """Save the memory, from rank zero, if this trainer's run saves anything."""
        self.directory = trainer.strategy.broadcast(self._place.find_free(trainer))
        if self.directory is None:
            return
        showing = trainer.is_global_zero and shows_progress(trainer)
        with Ranks(trainer).together("saving the memory"), working(showing, "saving the memory"):
            if trainer.is_global_zero:
                self.memory.save(self.directory)
        rank_zero_info(f"ResMem: saved the memory to {self.directory}.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the memory: its path."""
        return {} if self.directory is None else {"directory": str(self.directory)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the path from a checkpoint, unless there is a memory already; it is read when it is needed."""
        if "directory" in state_dict and not len(self.memory):
            self.directory = disk.as_path(state_dict["directory"])

    def has_rows(self, group: dist.ProcessGroup | None = None) -> bool:
        """Whether there is a memory, if need be from where it was saved.

        Args:
            group: Of the ranks of a job, each of which calls this.

        Raises:
            StorageError: If it is no longer there, or damaged.
        """
        if not len(self.memory) and self.directory is not None:
            try:
                with torch.inference_mode(False):  # what is made in inference mode can never be changed again
                    self.memory = self.read(self.directory, group)
            except StorageError as error:
                raise StorageError(
                    f"{error} That is where ResMemCallback saved it. If it is elsewhere now, give "
                    "ResMemCallback(memory=LocalMemory.load(directory)); if it is lost, fill it again: "
                    "memorize(trainer, model, dataloader)."
                ) from error
        return len(self.memory) > 0

    def read(self, directory: str | Path | disk.Url, group: dist.ProcessGroup | None = None) -> ResidualMemory:
        """A saved memory, of the kind that the user gave.

        Args:
            directory: Where it was saved.
            group: Of the ranks of a job, each of which calls this.
        """
        like = self._like
        memory = LocalMemory.load(directory) if like is None else like.restored(directory, group)
        rank_zero_info(f"ResMem: read {memory!r} from {directory}.")
        return memory

    def look(self, trainer: L.Trainer) -> None:
        """Under spawn and fork the memory was filled in processes that are gone: look where they saved it."""
        if not runs_elsewhere(trainer):
            return
        if self.directory is None:
            directory = self._place.find(trainer)
            self.directory = directory if directory is not None and directory.is_dir() else None
        elif len(self.memory) and self.directory.is_dir():
            # What this process loaded after one fit is replaced by the next.
            saved = disk.read_manifest(self.directory).get("provenance")
            self.memory = self.memory if saved == self.memory.provenance else LocalMemory()
