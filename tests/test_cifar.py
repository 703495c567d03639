"""The files of CIFAR in their official format, and what is done with them."""

import pickle
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.cifar_module import Cifar, ResNet, augmented, plain, read
from tests.memory.conftest import _one_thread

__all__ = ["_one_thread"]

EXAMPLES = Path(__file__).parents[1] / "examples"


class Hostile:
    def __reduce__(self):
        return eval, ("1/0",)


def write(file, rows, **more):
    data = np.random.default_rng(0).integers(0, 256, (rows, 3072), dtype=np.uint8)
    content = {
        b"data": data,
        b"fine_labels": [row % 100 for row in range(rows)],
        b"filenames": [b"a.png"] * rows,
        **more,
    }
    file.write_bytes(pickle.dumps(content, protocol=2))
    return data


@pytest.mark.parametrize("thing", [Hostile(), np.random.default_rng, pickle.loads], ids=["eval", "numpy", "pickle"])
def test_a_pickle_that_wants_more_is_refused(tmp_path, thing):
    write(tmp_path / "train", 3, more=thing)
    with (
        pytest.warns(UserWarning, match="not the official file"),
        pytest.raises(pickle.UnpicklingError, match="not need"),
    ):
        read(tmp_path / "train", b"fine_labels", "0")


def test_rows_are_those_of_the_files(tmp_path):
    data, _ = write(tmp_path / "train", 50), write(tmp_path / "test", 20)
    module = Cifar(str(tmp_path), classes=100, train_rows=40)
    with pytest.warns(UserWarning, match="MD5"):
        module.setup("fit")
    assert [len(part) for part in (module.train, module.val, module.test)] == [36, 4, 20]
    labels = torch.cat([module.train.tensors[1], module.val.tensors[1]])
    assert labels.unique().numel() == 40
    for image, label in zip(*module.train.tensors, strict=True):
        assert torch.equal(image.flatten(), torch.from_numpy(data[int(label)]))
    images, _ = next(iter(module.memory_dataloader()))
    assert torch.equal(images, plain(module.train.tensors)[0])
    assert ResNet(classes=100, n=1)(images).shape == (36, 100)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.filterwarnings("ignore:.*not the official file")
def test_sweep_over_the_size_of_the_training_set(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("COLUMNS", "120")
    write(tmp_path / "train", 60)
    write(tmp_path / "test", 20)
    picture, quick = (
        tmp_path / "cifar.png",
        ["--seeds", "2", "--epochs", "1", "--accelerator", "cpu", "--sizes", "30"],
    )
    runpy.run_path(str(EXAMPLES / "cifar.py"))["main"](["--data", str(tmp_path), *quick, "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "CIFAR-100, ResNet-8" in printed
    assert len(re.findall(r"\b30 (?:\W+\d+\.\d\d ± \d+\.\d\d){4}", printed)) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_images_are_shifted_and_mirrored():
    torch.manual_seed(0)
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    many, labels = augmented((image.expand(400, -1, -1, -1), torch.arange(400)))
    assert labels.tolist() == list(range(400))
    padded = torch.nn.functional.pad(plain((image, labels))[0], (4, 4, 4, 4))[0]
    shifted = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    crops = torch.stack([*shifted, *(crop.flip(2) for crop in shifted)])
    distances = torch.cdist(many.flatten(1), crops.flatten(1))
    assert distances.min(dim=1).values.max() < 0.1  # any other crop is 40 away
    assert distances.argmin(dim=1).unique().numel() > 100
