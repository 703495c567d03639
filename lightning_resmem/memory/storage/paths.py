"""Where a memory is: a directory of this machine, or a URL of a file system that fsspec knows."""

import os
import re
from pathlib import Path
from typing import Any

from lightning_resmem.errors import InputError

# A protocol, and whether what follows it makes a URL; `simplecache::s3://...` is a chain of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)")
# What is left of a URL in a pathlib.Path. A drive of Windows has one letter.
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Url(str):
    """A directory such as `s3://bucket/directory`, with what is needed here of `pathlib.Path`."""

    __slots__ = ()

    @property
    def fs(self) -> Any:
        """The file system."""
        return _file_system(self)[0]

    @property
    def root(self) -> str:
        """The directory as the file system names it."""
        return _file_system(self)[1]

    @property
    def name(self) -> str:
        """The last part."""
        return self.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """The directory around it."""
        return Url(self.rpartition("/")[0])

    def with_name(self, name: str) -> "Url":
        """Its neighbour of that name."""
        return self.parent / name

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self}/{name}")

    def exists(self) -> bool:
        """Whether anything is there."""
        return bool(self.fs.exists(self.root))

    def is_dir(self) -> bool:
        """Whether a directory is there."""
        return bool(self.fs.isdir(self.root))

    def is_file(self) -> bool:
        """Whether a file is there."""
        return bool(self.fs.isfile(self.root))


def as_path(directory: str | os.PathLike[str]) -> Path | Url:
    """Where a path or URL leads: the absolute path of a directory here, also for a `file` URL, or a URL.

    Raises:
        InputError: If it is neither, or no URL that can be used here.
    """
    text = os.fspath(directory) if isinstance(directory, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InputError(f"directory={directory!r} is not a path: give a string or a pathlib.Path.")
    if "\0" in text:
        raise InputError(f"directory={text!r} holds a NUL character: give a path without.")
    if _URL.match(text):
        return _opened(text)
    if _COLLAPSED.match(text):
        raise InputError(f"directory={text!r} is what pathlib.Path makes of a URL: give the URL as a string.")
    try:
        os.fsencode(text)
        return Path(text).expanduser().absolute()
    except (UnicodeEncodeError, RuntimeError) as error:  # half a character; `~` of nobody
        raise InputError(f"directory={text!r} is not a path of this machine ({error}): give another.") from error


def _opened(text: str) -> Path | Url:
    try:
        fs, root = _file_system(text)
    except Exception as error:  # every file system has errors of its own
        raise InputError(f"directory={text!r} cannot be used: {error}. Or give a path of this machine.") from error
    from fsspec.implementations.local import LocalFileSystem

    return Path(root) if isinstance(fs, LocalFileSystem) else Url(text.rstrip("/"))


def _file_system(text: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ModuleNotFoundError as error:
        raise InputError('URLs need fsspec: pip install "lightning-resmem[ray]"') from error
    fs, root = fsspec.core.url_to_fs(text)
    return fs, str(root).rstrip("/")
