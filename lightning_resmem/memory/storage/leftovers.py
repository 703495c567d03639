"""What earlier releases have left beside a memory when they were killed: they wrote there, and moved it into place.

The memory was written to `.NAME.TOKEN.partial/`, and the one before moved to `.NAME.TOKEN.replaced/NAME/`.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from lightning_resmem.memory.storage import manifest as manifests
from lightning_resmem.memory.storage.manifest import MANIFEST

# Nothing says whose they are. A process that is at it writes, or reads what it has written, but not for so long.
_QUIET_SECONDS = 3600.0


def remove(target: Path) -> None:
    """Remove what the dead have left beside a memory that was saved just now; what else is there stays.

    Args:
        target: The directory of the memory.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(partial|replaced)")
    with suppress(OSError):  # a directory that cannot be listed
        now = (target / MANIFEST).stat().st_mtime  # by the clock of that file system
        for directory in [Path(found) for found in os.scandir(target.parent) if name.fullmatch(found.name)]:
            with suppress(OSError):  # removed by somebody else, or not ours to remove
                _remove(directory, directory / target.name if directory.suffix == ".replaced" else directory, now)


def _remove(directory: Path, memory: Path, now: float) -> None:
    """Remove the files of a memory that lies in a directory, and the directory, unless something was changed lately."""
    places = [directory] if memory == directory else [directory, memory]
    if any(place.is_symlink() for place in places):
        return
    files = [file for file in memory.iterdir() if manifests.was_ours(file.name) and not file.is_dir()]
    if any(now - path.lstat().st_mtime < _QUIET_SECONDS for path in (*places, *files)):
        return
    for file in files:
        file.unlink()
    for place in reversed(places):
        place.rmdir()  # fails where there is more
