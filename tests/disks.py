"""Disks of their own, for tests of what happens when one is full or loses its power; they are skipped without any."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run(*command: str) -> str:
    """What a command prints; the test is skipped where it does not work."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def mounted(point: Path, *options: str) -> Iterator[Path]:
    """A file system, mounted at a new directory."""
    if os.geteuid():
        pytest.skip("only root may mount")
    point.mkdir()
    run("mount", *options, str(point))
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=60)


@contextmanager
def ext4(directory: Path) -> Iterator[tuple[Path, Path]]:
    """A small file system that is mounted, and the file that it is in, which can be copied as it is at any moment."""
    if os.geteuid() or not shutil.which("mkfs.ext4") or not shutil.which("losetup"):
        pytest.skip("needs root, mkfs.ext4 and losetup")
    image = directory / "image"
    with image.open("wb") as stream:
        stream.truncate(32 * 2**20)
    run("mkfs.ext4", "-q", str(image))
    run("losetup", "-f")
    with mounted(directory / "disk", "-o", "loop", str(image)) as disk:
        yield disk, image
