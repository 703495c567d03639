"""Directories of pools: removed once the process that made them has ended, and never before."""

import os
import shutil
from pathlib import Path

import pytest

from lightning_resmem.cluster import abandoned


@pytest.fixture
def pools(tmp_path: Path) -> list[Path]:
    """Directories of two pools, with rows."""
    directories = [tmp_path / "resmem-1", tmp_path / "resmem-2"]
    for directory in directories:
        (directory / "shard-0000-0").mkdir(parents=True)
        (directory / "shard-0000-0" / "rows").write_text("")
    return directories


def claimed(pool: Path) -> int:
    descriptor = abandoned.claim(str(pool))
    assert descriptor is not None
    return descriptor


def test_what_the_dead_have_left_is_removed(pools: list[Path], tmp_path: Path) -> None:
    dead, living = map(claimed, pools)
    abandoned.sweep(str(tmp_path))
    assert all((pool / "shard-0000-0" / "rows").exists() for pool in pools)
    os.close(dead)
    abandoned.sweep(tmp_path.as_uri())
    assert list(tmp_path.iterdir()) == [pools[1]]
    os.close(living)


def test_what_may_be_of_others_stays(pools: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        (tmp_path / "boot_id").write_text("another machine\n")
        elsewhere.setattr(abandoned, "_BOOT_ID", tmp_path / "boot_id")
        os.close(claimed(pools[0]))  # whether its process lives cannot be seen from here
    abandoned.sweep(str(tmp_path))  # the second was never claimed: that of a named pool, which outlives its process
    assert all(pool.exists() for pool in pools)


def test_a_copy_stays(pools: list[Path], tmp_path: Path) -> None:
    descriptor = claimed(pools[0])
    shutil.copytree(pools[0], tmp_path / "backup")
    abandoned.sweep(str(tmp_path))
    assert (tmp_path / "backup" / "shard-0000-0" / "rows").exists()
    os.close(descriptor)


def test_what_cannot_be_claimed_is_not(pools: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandoned, "_lock", lambda descriptor: False)
    assert abandoned.claim(str(pools[0])) is None
    monkeypatch.undo()
    monkeypatch.setattr(abandoned, "_BOOT_ID", pools[0] / "no such file")
    assert abandoned.claim(str(pools[0])) is None
    monkeypatch.undo()
    pools[1].joinpath(abandoned._owner(pools[1])).mkdir()  # nothing can take its place
    assert abandoned.claim(str(pools[1])) is None
    assert [part.name for part in pools[0].iterdir()] == ["shard-0000-0"]


@pytest.mark.parametrize("unseen", ["memory://pools/resmem-1", "/nowhere/resmem-1"])
def test_a_directory_that_is_not_seen_from_here_is_not_claimed(unseen: str) -> None:
    assert abandoned.claim(unseen) is None
    abandoned.sweep(os.path.dirname(unseen))
    abandoned.remove(unseen)
