"""A shard's journal, on the local disk and on another file system that fsspec knows."""

import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lightning_resmem.cluster.journal import Entry, Journal
from lightning_resmem.errors import StorageError


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
    for number in (1, 2, 10, 11):
        journal.write(entry(number))
    again = Journal(url)
    assert again.start() == 1
    assert again.base() == 0
    assert list(again.entries()) == [entry(number) for number in (1, 2, 10, 11)]


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
