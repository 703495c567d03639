"""examples/ray_train.py: under Ray Train the callback does what it does without."""

import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from examples.digits import MLP, split
from lightning_resmem import ResMemModule, memorize
from tests.interpreters import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]  # processes start slowly on a busy machine


# A Ray of its own: that of the session has no dashboard, and Ray Train, which looks there for its own actors, may then
# find another Ray's on this machine and take itself for dead.
def test_the_same_memory_as_without_ray_train(tmp_path: Path) -> None:
    options = ["--epochs", "5", "--shards", "1", "--directory", "results"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_train.py"), *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"2 ranks memorized 1000 rows; weights and memory are in (\S+)", done.stdout)
    checkpoint = Path(found[1])
    assert checkpoint.is_relative_to(tmp_path / "results")

    base = MLP.load_from_checkpoint(checkpoint / "base.ckpt", hidden=16)
    module = ResMemModule.load(checkpoint / "resmem", base=base)
    train, val, test = split(seed=0)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    expected = memorize(trainer, base, DataLoader(train, batch_size=16), DataLoader(val, batch_size=64))
    assert module.memory.ids.tolist() == expected.memory.ids.tolist() == list(range(1000))
    for name in ("k", "sigma", "softmax_temperature", "strength"):
        chosen = getattr(module.memory.params, name)
        assert chosen == pytest.approx(getattr(expected.memory.params, name), rel=1e-4)
    inputs, targets = test.tensors
    torch.testing.assert_close(module(inputs), expected(inputs), rtol=0, atol=1e-4)

    printed = {name: float(value) for name, value in re.findall(r"(\w+): test accuracy ([\d.]+)", done.stdout)}
    for name, scores in expected.predictions((inputs,))._asdict().items():
        accuracy = (scores.argmax(dim=1) == targets).float().mean().item()
        assert printed[name] == pytest.approx(accuracy, abs=1e-4)
