"""A shard's journal, on the local disk and on another file system that fsspec knows."""

import os
import random
import re
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.errors import StorageError
from tests.disks import mounted


@pytest.fixture(params=["path", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "path": str(tmp_path / "pool" / "shard"),
        "file": (tmp_path / "pool" / "shard").as_uri(),
        "memory": f"memory://{uuid.uuid4().hex}/shard",
    }[request.param]


def entry(number: int, operation: str = "add") -> Entry:
    return Entry(number, operation, f"key{number}", bytes([number]) * 10)


def save(path: Path, content: str = "rows") -> None:
    path.mkdir()
    (path / "manifest.json").write_text(content)
    (path / "keys.safetensors").write_text(content)


def test_changes_come_back_in_their_order(url: str) -> None:
    journal = Journal(url)
    assert journal.start() == 0
    for number in range(1, 12):
        journal.write(entry(number))
    again = Journal(url)
    assert again.start() == 1
    assert again.base() == 0
    assert list(again.entries()) == [entry(number) for number in range(1, 12)]


def test_a_base_takes_the_place_of_what_was_before(url: str) -> None:
    journal = Journal(url)
    journal.start()
    for number in (1, 2, 3):
        journal.write(entry(number))
    journal.write_base(2, save)
    assert journal.base() == 2
    assert list(journal.entries()) == [entry(3)]
    with journal.reading_base() as directory:
        assert (directory / "keys.safetensors").read_text() == "rows"
    journal.write_base(3, lambda path: save(path, "more rows"))
    assert journal.base() == 3
    assert list(journal.entries()) == []
    with journal.reading_base() as directory:
        assert (directory / "manifest.json").read_text() == "more rows"


def test_clearing_leaves_only_that(url: str) -> None:
    journal = Journal(url)
    journal.start()
    journal.write(entry(1))
    journal.write_base(1, save)
    journal.write(entry(2))
    journal.write(entry(3, "clear"))
    journal.write(entry(4))
    assert journal.base() == 0
    assert [found.operation for found in journal.entries()] == ["clear", "add"]


def test_what_was_acknowledged_is_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split("-")[0])
        fsync(descriptor)

    journal = Journal(str(tmp_path / "pool" / "shard"))
    journal.start()
    monkeypatch.setattr(os, "fsync", noted)
    for number, operation, names in (
        (1, "add", []),
        (2, "add", []),
        (3, "describe", ["0000000003", "shard"]),
        (4, "remove", ["0000000002", "0000000001", "0000000004", "shard"]),
        (5, "update", ["0000000005", "shard"]),
        (6, "add", []),
        (7, "clear", ["0000000007", "shard"]),
        (8, "restore", ["0000000008", "shard"]),
    ):
        synced.clear()
        journal.write(entry(number, operation))
        assert synced == names


def test_what_is_half_written_is_not_there(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "shard"))
    journal.start()
    journal.write(entry(1))
    (tmp_path / "shard" / "0000000002-add-key.safetensors.partial").write_text("half")
    (tmp_path / "shard" / "base-0000000002").mkdir()
    (tmp_path / "shard" / "base-0000000002" / "keys.safetensors").write_text("half")
    (tmp_path / "shard" / ".base-0000000003.x.partial").mkdir()
    assert journal.base() == 0
    assert list(journal.entries()) == [entry(1)]
    journal.write(entry(2))
    journal.write(entry(3))
    (tmp_path / "shard" / "base-0000000002" / "keys.safetensors").unlink()
    (tmp_path / "shard" / "base-0000000002").rmdir()
    journal.write_base(3, save)
    assert sorted(path.name for path in (tmp_path / "shard").iterdir()) == ["base-0000000003", "started-0"]


def test_changes_that_a_base_holds_are_not_made_again(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "shard"))
    journal.start()
    for number in (1, 2, 3):
        journal.write(entry(number))
    save(tmp_path / "shard" / "base-0000000002")  # as a process leaves it that is killed before it drops the changes
    assert list(journal.entries()) == [entry(3)]


def test_a_base_that_arrived_in_part_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(f"memory://{uuid.uuid4().hex}/shard")
    journal.start()
    journal.write(entry(1))
    put_file, sent = MemoryFileSystem.put_file, []

    def put_two(self: MemoryFileSystem, source: str, target: str) -> None:
        if len(sent) == 2:
            raise OSError("connection lost")
        sent.append(target)
        put_file(self, source, target)

    def save_three(path: Path) -> None:
        save(path)
        (path / "outputs.safetensors").write_text("rows")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_two)
    with pytest.raises(StorageError, match="connection lost"):
        journal.write_base(1, save_three)
    assert len(sent) == 2
    assert journal.base() == 0
    assert list(journal.entries()) == [entry(1)]


def test_a_base_that_cannot_be_saved_changes_nothing(url: str) -> None:
    journal = Journal(url)
    journal.start()
    journal.write(entry(1))

    def full(path: Path) -> None:
        raise OSError("No space left on device")

    with pytest.raises(StorageError, match=r"No space left on device.*another storage_path"):
        journal.write_base(1, full)
    assert journal.base() == 0
    assert list(journal.entries()) == [entry(1)]


def test_removed_with_the_directory_around_it_when_that_is_empty(tmp_path: Path) -> None:
    one, two = Journal(str(tmp_path / "pool" / "one")), Journal(str(tmp_path / "pool" / "two"))
    for journal in (one, two):
        journal.start()
        journal.write(entry(1))
    one.remove()
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["two"]
    two.remove()
    assert not (tmp_path / "pool").exists()
    two.remove()


def test_a_directory_that_has_vanished_is_not_made_again_without_its_rows(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "pool" / "one"))
    journal.start()
    journal.write(entry(1))
    journal.remove()
    with pytest.raises(StorageError, match="vanished"):
        journal.write(entry(2))
    with pytest.raises(StorageError, match="vanished"):
        journal.write_base(2, save)


def filled(directory: Path, numbers: range) -> tuple[Journal, dict[int, Path]]:
    """A journal with changes, and the file of each."""
    journal = Journal(str(directory))
    journal.start()
    for number in numbers:
        journal.write(entry(number))
    return journal, {number: next(directory.glob(f"{number:010d}-*")) for number in numbers}


def test_every_flipped_bit_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    journal, files = filled(tmp_path / "shard", range(1, 6))
    chosen = random.Random(0)
    for _ in range(100):
        file = files[chosen.randint(1, 5)]
        written = file.read_bytes()
        damaged = bytearray(written)
        damaged[chosen.randrange(len(damaged))] ^= 1 << chosen.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(StorageError, match=rf"{re.escape(file.name)} is damaged"):
            list(journal.entries())
        file.write_bytes(written)
    assert list(journal.entries()) == [entry(number) for number in range(1, 6)]


@pytest.mark.parametrize("cut", [0, 3])
def test_a_file_that_was_cut_short_is_noticed(cut: int, tmp_path: Path) -> None:
    journal, files = filled(tmp_path / "shard", range(1, 3))
    files[2].write_bytes(files[2].read_bytes()[:cut])
    with pytest.raises(StorageError, match=f"{files[2].name} is damaged"):
        list(journal.entries())


def test_what_a_name_says_is_covered_by_the_checksum(tmp_path: Path) -> None:
    journal, files = filled(tmp_path / "shard", range(1, 3))
    for old, new in (("-add-", "-remove-"), ("-key2-", "-key3-")):
        renamed = files[2].rename(files[2].with_name(files[2].name.replace(old, new)))
        with pytest.raises(StorageError, match="is damaged"):
            list(journal.entries())
        renamed.rename(files[2])


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_change_that_is_missing_is_named(missing: int, tmp_path: Path) -> None:
    journal, files = filled(tmp_path / "shard", range(1, 5))
    files[missing].unlink()
    with pytest.raises(StorageError, match=f"is damaged: change {missing} is missing"):
        list(journal.entries())


def test_a_base_that_is_missing_is_noticed(tmp_path: Path) -> None:
    journal, _ = filled(tmp_path / "shard", range(1, 3))
    journal.write_base(2, save)
    journal.write(entry(3))
    (tmp_path / "shard" / "base-0000000002" / "manifest.json").unlink()
    with pytest.raises(StorageError, match="change 1 is missing"):
        list(journal.entries())


def test_a_number_that_two_changes_have_is_named(tmp_path: Path) -> None:
    journal, _ = filled(tmp_path / "shard", range(1, 3))
    journal.write(Entry(2, "add", "other", b"of a process that was thought dead"))
    with pytest.raises(StorageError, match="change 2 comes after one of the same number"):
        list(journal.entries())


def test_what_a_clear_was_about_to_delete_is_ignored(tmp_path: Path) -> None:
    journal, files = filled(tmp_path / "shard", range(1, 4))
    journal.write_base(2, save)
    left = {path.name: path.read_bytes() for path in (tmp_path / "shard").glob("*3-*")}
    journal.write(entry(9, "clear"))
    for name, content in left.items():
        (tmp_path / "shard" / name).write_bytes(content)
    save(tmp_path / "shard" / "base-0000000002")
    journal.write(entry(10))
    assert files[3].exists()
    assert (journal.base(), journal.last()) == (0, 10)
    assert list(journal.entries()) == [entry(9, "clear"), entry(10)]


def test_changes_that_were_written_without_a_checksum_can_be_read(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "shard"))
    journal.start()
    for number in (1, 2):
        (tmp_path / "shard" / f"{number:010d}-add-key{number}.safetensors").write_bytes(entry(number).data)
    journal.write(entry(3))
    assert list(journal.entries()) == [entry(number) for number in (1, 2, 3)]
    save(tmp_path / "shard" / "base-0000000001")
    assert list(journal.entries()) == [entry(2), entry(3)]


def test_a_directory_that_is_not_there_is_not_one_without_changes(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "shard"))
    for ask in (journal.base, journal.last, lambda: list(journal.entries())):
        with pytest.raises(StorageError, match="vanished"):
            ask()


def test_a_change_that_does_not_fit_leaves_room_for_smaller_ones(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as disk:
        journal = Journal(str(disk / "shard"))
        journal.start()
        with pytest.raises(StorageError, match="No space left on device"):
            journal.write(Entry(1, "add", "large", bytes(2**20)))
        journal.write(entry(1))
        assert list(journal.entries()) == [entry(1)]
