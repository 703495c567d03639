"""Contents that are impossible although their checksums hold."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lightning_resmem import LocalMemory, Multilabel, Regression, ResMemParams, SparseConfig, StorageError
from lightning_resmem.memory.storage import files
from lightning_resmem.memory.storage.saved import read_saved
from lightning_resmem.tasks import Task
from tests.saved_files import edited, file_of

ROWS, CLASSES = 30, 5


def saved(path: Path, task: Task | None, **options: object) -> Path:
    memory = LocalMemory(task, ResMemParams(k=3), **options)
    labels = torch.arange(ROWS) % CLASSES if task is None else torch.rand(ROWS, CLASSES).round()
    memory.add(torch.randn(ROWS, 4), torch.randn(ROWS, CLASSES), labels)
    found = memory.save(path)
    assert isinstance(found, Path)
    return found


def put(path: Path, name: str, place: int, value: float) -> None:
    """Change an entry of a file, and the checksums to match."""
    file = file_of(path, name)
    tensor: Tensor = safetensors.torch.load_file(file)[name].clone()
    tensor.view(-1)[place] = value
    safetensors.torch.save_file({name: tensor}, file)
    edited(path, lambda manifest: manifest["tensors"][name].update(sha256=files.sha256(file)))


SPARSE = {"values": SparseConfig(2)}


@pytest.mark.parametrize(
    ("task", "options", "name", "place", "value", "message"),
    [
        (None, {}, "ids", 0, -1, "ids are negative or not ascending"),
        (None, {}, "ids", 7, 8, "ids are negative or not ascending"),
        (None, {}, "ids", 7, 99, "ids are negative or not ascending"),
        (None, {}, "targets", 3, CLASSES, r"the files hold class 5 \(targets\)"),
        (None, {}, "targets", 3, -1, r"the files hold class -1 \(targets\)"),
        (None, {}, "keys", 3, torch.nan, "keys holds NaN or infinite entries"),
        (None, {}, "keys", 3, -torch.inf, "keys holds NaN or infinite entries"),
        (None, {}, "outputs", 3, torch.nan, "outputs holds NaN or infinite entries"),
        (None, {"key_dtype": torch.float16}, "keys", 3, torch.inf, "keys holds NaN or infinite entries"),
        (None, SPARSE, "classes", 3, -1, r"the files hold class -1 \(classes\)"),
        (None, SPARSE, "log_probabilities", 3, torch.nan, "log_probabilities holds NaN"),
        (None, SPARSE, "log_tail", 3, torch.nan, "log_tail holds NaN"),
        (Multilabel(), {}, "targets", 3, 1.5, r"targets are between 0.0 and 1.5, not within \[0, 1\]"),
        (Multilabel(), {}, "targets", 3, torch.nan, r"targets are between nan and nan"),
        (Regression(), {}, "targets", 3, torch.nan, "targets holds NaN"),
    ],
)
def test_impossible_rows_are_refused(
    tmp_path: Path, task: Task | None, options: dict, name: str, place: int, value: float, message: str
) -> None:
    path = saved(tmp_path / "memory", task, **options)
    LocalMemory.load(path)
    put(path, name, place, value)
    with pytest.raises(StorageError, match=message):
        LocalMemory.load(path)
    with read_saved(path, mmap=True) as found, pytest.raises(StorageError, match=message):
        found.verify()


def test_large_and_small_numbers_are_possible(tmp_path: Path) -> None:
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.full((3, 4), 1e38), torch.full((3, 5), -3e38), torch.zeros(3, dtype=torch.int64))
    assert len(LocalMemory.load(memory.save(tmp_path / "memory"))) == 3  # though their sums are infinite


def test_a_row_that_keeps_all_its_probabilities_has_no_tail(tmp_path: Path) -> None:
    path = saved(tmp_path / "memory", None, values=SparseConfig(CLASSES))
    assert torch.isneginf(safetensors.torch.load_file(file_of(path, "log_tail"))["log_tail"]).all()
    assert len(LocalMemory.load(path)) == ROWS


@pytest.mark.parametrize(("name", "dtype"), [("ids", torch.int32), ("keys", torch.float64), ("targets", torch.float32)])
def test_dtypes_that_are_never_saved(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = saved(tmp_path / "memory", None)
    file = file_of(path, name)
    safetensors.torch.save_file({name: safetensors.torch.load_file(file)[name].to(dtype)}, file)
    stated = {"sha256": files.sha256(file), "dtype": str(dtype).removeprefix("torch.")}
    edited(path, lambda manifest: manifest["tensors"][name].update(stated))
    with pytest.raises(StorageError, match=f"tensors.{name}.dtype is {dtype}"):
        LocalMemory.load(path, mmap=True)
