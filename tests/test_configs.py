"""Every file in configs/ is what its reader takes it for; those whose data is here, or easily made, also run."""

import pickle
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_resmem import ResMemCallback
from lightning_resmem.cli.training import ResMemTrainer
from tests.memory.conftest import _one_thread

__all__ = ["_one_thread"]

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
TRAINING = ["cifar10", "cifar100", "digits", "forecasting", "language_model", "ray"]
OTHERS = ["ray.kuberay.yaml", "ray.slurm", "sweep.yaml"]  # the sweep: tests/test_wandb_run.py


@pytest.fixture(scope="module")
def parser() -> LightningArgumentParser:
    """What `resmem fit` parses a config with, made once: that takes seconds."""
    made = LightningArgumentParser()
    made.add_argument("--seed_everything", type=int)
    made.add_lightning_class_args(ResMemTrainer, "trainer")
    made.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    made.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    return made


def test_every_config_is_looked_at() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted([f"{name}.yaml" for name in TRAINING] + OTHERS)


@pytest.mark.parametrize("name", TRAINING)
def test_configs_are_parsed(parser: LightningArgumentParser, name: str) -> None:
    config = parser.parse_path(CONFIGS / f"{name}.yaml")
    directories = [callback.init_args.dirpath for callback in config.trainer.callbacks]
    assert directories == [f"outputs/{name}/resmem", f"outputs/{name}/checkpoints"]
    assert config.trainer.default_root_dir == f"outputs/{name}"


@pytest.mark.parametrize("name", TRAINING)
def test_commands_in_the_comments_name_the_file_and_its_directories(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"resmem (?:fit|test|memorize|tune) --config (\S+)", text)
    assert commands
    assert set(commands) == {f"configs/{name}.yaml"}


def cifar(directory: Path) -> dict[str, Any]:
    """A dozen rows of noise in the place of each file of CIFAR-10."""
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        rows = {b"data": generator.integers(0, 256, (12, 3072), dtype=np.uint8), b"labels": [*range(10), 0, 1]}
        (directory / name).write_bytes(pickle.dumps(rows, protocol=2))
    return {"directory": str(directory)}


def text(directory: Path) -> dict[str, Any]:
    (directory / "text.txt").write_bytes((ROOT / "LICENSE").read_bytes()[:1500])
    return {"file": str(directory / "text.txt"), "batch_size": 32}


@pytest.mark.parametrize(
    ("name", "data"),
    [("cifar10", cifar), ("forecasting", lambda _: {}), ("language_model", text)],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.usefixtures("_one_thread")
def test_fit_runs(parser, tmp_path, monkeypatch, name, data) -> None:
    """A step of each kind, as `--trainer.fast_dev_run=true` does it, fills the memory; for text its key is chosen."""
    monkeypatch.chdir(tmp_path)
    written = (CONFIGS / f"{name}.yaml").read_text()
    if name == "language_model":
        written = written.replace("        dirpath: outputs/language_model/resmem\n", "        embedding: auto\n")
    config = parser.parse_string(written)
    quick = {"fast_dev_run": True, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    for part, given in ((config.data.init_args, data(tmp_path)), (config.trainer, quick)):
        for argument, value in given.items():
            part[argument] = value
    made = parser.instantiate_classes(config)
    trainer = ResMemTrainer(**made.trainer)
    trainer.fit(made.model, datamodule=made.data)
    callback = next(callback for callback in trainer.callbacks if isinstance(callback, ResMemCallback))
    assert len(callback.memory) > 0
    assert ("keys" in callback.memory.provenance) == (name == "language_model")
    trainer.test(made.model, datamodule=made.data, verbose=False)
    assert callback.evaluation.rows > 0


def test_jobs_for_clusters_run_the_config() -> None:
    slurm = CONFIGS / "ray.slurm"
    subprocess.run(["bash", "-n", slurm], check=True)
    job = yaml.safe_load((CONFIGS / "ray.kuberay.yaml").read_text(encoding="utf-8"))
    assert job["kind"] == "RayJob"
    for command in (slurm.read_text(encoding="utf-8"), job["spec"]["entrypoint"]):
        assert "resmem fit --config configs/ray.yaml" in command
