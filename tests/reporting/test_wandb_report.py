"""What Weights & Biases runs hold, read back from the files of real offline runs."""

import builtins
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import (
    GridTuner,
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    StaleMemoryError,
    StorageError,
)
from lightning_resmem.reporting.wandb_report import artifact_name
from tests.interpreters import run_python
from tests.models import CallsSelf, Data, ManyLabels, make, memory_for, trainer
from tests.wandb_records import OfflineRun, runs_in

ROOT = Path(__file__).parents[2]
QUICK = GridTuner(k=[3, 9], sigma=[0.1, 0.5], softmax_temperature=[1.0], strength=[1.0])


@contextmanager
def wandb_in(directory: Path, mode: str = "offline") -> Iterator[None]:
    """Weights & Biases with all of its files in a directory, and gone at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", mode)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DISABLE_GIT", "true")  # of which older versions leave a process
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(directory / "home"))
        before = dict(os.environ)
        try:
            yield
        finally:
            wandb.finish()
            wandb.teardown()  # ends its service process
            for name in os.environ.keys() - before.keys():
                del os.environ[name]


class Pixels(CallsSelf):
    """Digits as images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
        self.head = nn.Linear(6, 10)


class Run:
    """Digits learned badly, so that the memory changes much, with a run that is closed and read back."""

    def __init__(self, root: Path, digits) -> None:
        train, val, test = (
            TensorDataset(part.inputs.reshape(-1, 1, 8, 8), part.targets)
            for part in (digits.train, digits.val, digits.test)
        )
        self.train, self.test = train, test
        self.model, self.callback = make(Pixels), ResMemCallback(tuner=QUICK, log_memory_artifact=True)
        with wandb_in(root):
            logger = WandbLogger(project="tests", save_dir=root, log_model=True)
            options = {"logger": logger, "max_epochs": 2, "enable_checkpointing": True}
            run = trainer(root, self.callback, ModelCheckpoint(root / "checkpoints"), **options)
            run.fit(self.model, DataLoader(train, 64, shuffle=True), DataLoader(val, 300))
            self.metrics = {name: value.item() for name, value in run.callback_metrics.items()}
            run.test(self.model, DataLoader(test, 100), verbose=False)
            self.metrics |= {name: value.item() for name, value in run.callback_metrics.items()}
            self.step, self.run_id = run.global_step, logger.version
            logger.experiment.finish()
        (self.offline,) = runs_in(root)


@pytest.fixture(scope="module")
def done(tmp_path_factory, digits) -> Run:
    return Run(tmp_path_factory.mktemp("wandb"), digits)


@pytest.fixture(scope="module")
def offline(done) -> OfflineRun:
    return done.offline


def test_the_run_is_complete(offline):
    assert offline.exit_code == 0


def test_metrics_are_those_of_the_trainer(done, offline):
    found = offline.last()
    wanted = {name: value for name, value in done.metrics.items() if name.startswith(("resmem/", "test/"))}
    assert {"resmem/rows", "resmem/tuning_gain", "test/acc_resmem", "test/ece_knn", "test/gain_error"} <= set(wanted)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert {logged["trainer/global_step"] for logged in offline.history if "resmem/rows" in logged} == {done.step}


def test_params_are_in_the_config(done, offline):
    params, memory = offline.config["resmem"], done.callback.memory
    assert {name: params[name] for name in ("k", "sigma", "strength", "softmax_temperature")} == pytest.approx(
        {name: getattr(memory.params, name) for name in ("k", "sigma", "strength", "softmax_temperature")}
    )
    assert params["fingerprint"] == memory.provenance["fingerprint"]


def test_the_summary_has_plain_numbers(done, offline):
    names = ("test/acc_base", "test/acc_resmem", "test/gain", "resmem/rows", "resmem/tuning_acc_resmem")
    assert {name: offline.summary[name] for name in names} == pytest.approx(
        {name: done.metrics[name] for name in names}
    )


def test_single_numbers_get_no_charts(offline):
    assert offline.metrics["resmem/rows"].options.hidden
    assert offline.metrics["resmem/rows"].step_metric == "trainer/global_step"
    shown = offline.metrics.get("test/acc_resmem")  # older versions note a metric that falls under a pattern
    assert shown is None or not shown.options.hidden


def test_the_settings_tried_are_a_table(done, offline):
    rows, wanted = offline.table("resmem/tuning_table"), done.callback.tuning.table
    assert len(rows) == len(wanted) >= 5
    for row, setting in zip(rows, wanted, strict=True):
        assert row == pytest.approx(setting)


def test_plots_are_images(offline):
    for name in ("resmem/tuning", "test/by_distance", "test/reliability", "test/flips"):
        picture = np.asarray(Image.open(offline.image(name)))
        assert picture.shape[0] > 300
        assert len(np.unique(picture)) > 10


def test_scores_stand_side_by_side(done, offline):
    rows = {row["score"]: row for row in offline.table("test/scores")}
    assert {"acc", "nll", "ece", "f1"} <= set(rows)
    for name, row in rows.items():
        for part in ("base", "knn", "resmem"):
            assert row[part] == pytest.approx(done.metrics[f"test/{name}_{part}"])
        less_is_better = name in ("nll", "ece", "brier")
        assert row["gain"] == pytest.approx((row["resmem"] - row["base"]) * (-1 if less_is_better else 1))


def test_flipped_rows_stand_with_their_neighbours(done, offline):
    rows, flips = offline.table("test/flipped_rows"), done.callback.evaluation.flips
    by_position = {flip.position: flip for flip in flips}
    assert {row["flip"] for row in rows} == {"turned right", "turned wrong"}
    for row in rows:
        flip = by_position[row["position"]]
        assert row["target"] == flip.target == int(done.test[flip.position][1])
        assert (row["base"], row["resmem"]) == (flip.base, flip.resmem)
        assert (row["flip"] == "turned right") == (flip.resmem == flip.target)
        assert row["base_confidence"] == pytest.approx(flip.base_confidence)


def uint8(image: torch.Tensor) -> np.ndarray:
    return ((image[0] - image.min()) / (image.max() - image.min()) * 255).round().numpy().astype(np.uint8)


def test_flipped_rows_show_their_pictures(done, offline):
    (name,) = [name for name in offline.artifacts if "flipped_rows" in name]
    files = offline.artifact_files(name)
    table = json.loads(files["test/flipped_rows.table.json"].read_text())
    flips = {flip.position: flip for flip in done.callback.evaluation.flips}
    for row in table["data"]:
        cells = dict(zip(table["columns"], row, strict=True))
        flip = flips[cells["position"]]
        shown = np.asarray(Image.open(files[cells["image"]["path"]]))
        assert np.array_equal(shown, uint8(done.test[flip.position][0]))
        for place, (id, distance) in enumerate(zip(flip.neighbor_ids, flip.neighbor_distances, strict=True), 1):
            neighbor, label = done.train[id]
            shown = np.asarray(Image.open(files[cells[f"neighbor_{place}"]["path"]]))
            assert np.array_equal(shown, uint8(neighbor))
            assert cells[f"neighbor_{place}"]["caption"] == f"{label} (#{id}, distance {distance:.3g})"


def test_the_memory_is_an_artifact_that_knows_its_weights_and_model(done, offline, tmp_path):
    artifact, files = offline.artifacts["memory"], offline.artifact_files("memory")
    metadata = json.loads(artifact.metadata)
    assert artifact.type == "memory"
    assert set(artifact.aliases) == {"latest", f"run-{done.run_id}"}
    assert metadata["fingerprint"] == done.callback.memory.provenance["fingerprint"]
    assert metadata["rows"] == len(done.train)
    assert metadata["params"]["k"] == done.callback.memory.params.k
    assert offline.artifacts[metadata["model_artifact"]].type == "model", "the run's own checkpoint"

    for path, file in files.items():
        shutil.copy(file, tmp_path / path)
    loaded = ResMemModule.from_wandb(str(tmp_path), base=done.model)
    batch = next(iter(DataLoader(done.test, 20)))
    assert torch.equal(loaded.predict_step(batch, 0), done.callback.module.predict_step(batch, 0))
    with pytest.raises(StaleMemoryError):
        ResMemModule.from_wandb(str(tmp_path), base=make(Pixels, seed=1))


# -- other runs


def fit_and_test(root: Path, mode: str, kind=CallsSelf, **options) -> ResMemCallback:
    with wandb_in(root, mode):
        callback, model = ResMemCallback(memory_for(kind), **options), make(kind)
        run = trainer(root, callback, logger=WandbLogger(project="tests", save_dir=root))
        run.fit(model, datamodule=Data(kind.task))
        run.test(model, datamodule=Data(kind.task), verbose=False)
    return callback


def test_rows_that_are_no_images_have_words_for_neighbours(tmp_path):
    callback = fit_and_test(tmp_path, "offline")
    (run,) = runs_in(tmp_path)
    rows = run.table("test/flipped_rows")
    assert len(rows) == len(callback.evaluation.flips) > 5
    labels = Data().train[1]
    flips = {flip.position: flip for flip in callback.evaluation.flips}
    for row in rows:
        id, distance = flips[row["position"]].neighbor_ids[0], flips[row["position"]].neighbor_distances[0]
        assert row["neighbor_1"] == f"{labels[id]} (#{id}, distance {distance:.3g})"
    assert "memory" not in run.artifacts, "nobody asked for it"


def test_several_labels_show_the_one_that_flipped(tmp_path):
    callback = fit_and_test(tmp_path, "offline", ManyLabels)
    (run,) = runs_in(tmp_path)
    labels = Data("multilabel").train[1]
    for row in run.table("test/flipped_rows"):
        flip = next(f for f in callback.evaluation.flips if (f.position, f.output) == (row["position"], row["output"]))
        id = flip.neighbor_ids[0]
        assert row["neighbor_1"].startswith(f"{labels[id, flip.output]:g} (#{id},")


def test_a_memory_that_is_saved_nowhere_can_be_logged(tmp_path):
    callback = fit_and_test(tmp_path, "offline", log_memory_artifact=True, name="mine")
    (run,) = runs_in(tmp_path)
    files = run.artifact_files("memory-mine")
    assert json.loads(files["manifest.json"].read_text())["rows"] == len(callback.memory)
    assert "model_artifact" not in json.loads(run.artifacts["memory-mine"].metadata), "the run logs no model"


@pytest.mark.parametrize(("name", "artifact"), [("layer 4", "memory-layer-4-09adccb6"), ("a*ä", "memory-a--a6686f30")])
def test_names_that_wandb_refuses_become_ones_that_it_takes(tmp_path, recwarn, name, artifact):
    callback = fit_and_test(tmp_path, "offline", log_memory_artifact=True, name=name)
    assert [str(w.message) for w in recwarn if "did not take" in str(w.message)] == []
    (run,) = runs_in(tmp_path)
    files = run.artifact_files(artifact)
    assert json.loads(files["manifest.json"].read_text())["rows"] == len(callback.memory)
    assert run.last()[f"{name}/rows"] == len(callback.memory)


def test_names_of_artifacts_stay_apart_and_short():
    names = ["resmem", "a b", "a-b", "a:b", "x" * 300, "x" * 301]
    found = [artifact_name(name) for name in names]
    assert len(set(found)) == len(names)
    assert max(map(len, found)) <= 128


@pytest.mark.parametrize("value", ["on", {"k": "theirs"}, None])
def test_a_config_key_of_the_users_is_kept(tmp_path, value):
    with wandb_in(tmp_path):
        logger, callback = WandbLogger(project="tests", save_dir=tmp_path), ResMemCallback(memory_for(CallsSelf))
        logger.experiment.config.update({"resmem": value, "lr": 0.1})
        run, model = trainer(tmp_path, callback, logger=logger), make(CallsSelf)
        for _ in range(2):  # the second time what is ours is replaced
            run.fit(model, datamodule=Data())
            run.fit_loop.max_epochs += 1
        logger.experiment.finish()
    (offline,) = runs_in(tmp_path)
    assert offline.config["resmem"] == value
    assert offline.config["lr"] == 0.1
    assert offline.config["resmem_memory"]["k"] == callback.memory.params.k
    assert offline.config["resmem_memory"]["fingerprint"] == callback.memory.provenance["fingerprint"]
    assert not any(name.startswith("resmem_memory_") for name in offline.config)


def test_disabled_runs_take_everything_and_write_nothing(tmp_path, recwarn):
    callback = fit_and_test(tmp_path, "disabled", log_memory_artifact=True)
    assert callback.evaluation is not None
    assert [str(w.message) for w in recwarn if "did not take" in str(w.message)] == []
    assert runs_in(tmp_path) == []


@pytest.mark.parametrize("value", [None, "yes", 1])
def test_the_switch_is_checked(value):
    with pytest.raises(InputError, match="log_memory_artifact="):
        ResMemCallback(log_memory_artifact=value)


# -- getting a memory back


def test_offline_there_is_a_way_out(tmp_path):
    with wandb_in(tmp_path):
        for _ in range(2):
            with pytest.raises(StorageError, match=r"offline\. .*wandb artifact get e/p/memory:v3 --root DIR.*load"):
                ResMemModule.from_wandb("e/p/memory:v3", base=make(CallsSelf))
            wandb.init(project="tests", dir=tmp_path)  # with a run as without


def test_without_wandb_there_is_a_hint(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "wandb":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"needs wandb: pip install"):
        ResMemModule.from_wandb("e/p/memory:v3", base=make(CallsSelf))


def test_online_the_artifact_is_downloaded(tmp_path, monkeypatch):
    """There is no server here: a stand-in for the two calls of wandb's public API that talk to it."""
    model = make(CallsSelf)
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.rand(3, 5), torch.rand(3, 4), torch.tensor([0, 1, 2]))
    saved = ResMemModule(model, memory, head="head").save(tmp_path / "server")
    asked = []

    @dataclasses.dataclass
    class Artifact:
        name: str

        def download(self, root=None):
            return shutil.copytree(saved, root or tmp_path / "default")

    class Api:
        def artifact(self, name, type=None):
            asked.append((name, type))
            return Artifact(name)

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    loaded = ResMemModule.from_wandb("e/p/memory:v3", base=model, root=str(tmp_path / "here"))
    assert asked == [("e/p/memory:v3", "memory")]
    assert torch.equal(loaded.memory.ids, memory.ids)
    assert (tmp_path / "here" / "manifest.json").is_file()

    class Gone(Api):
        def artifact(self, name, type=None):
            raise wandb.errors.CommError("no such artifact")

    monkeypatch.setattr(wandb, "Api", Gone)
    with pytest.raises(StorageError, match="e/p/memory:v3 cannot be downloaded: no such artifact"):
        ResMemModule.from_wandb("e/p/memory:v3", base=model)


# -- several processes

SCRIPT = """
import multiprocessing
import sys
from pathlib import Path
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning_resmem import ResMemCallback
from tests.models import CallsSelf, Data, make, memory_for, trainer

if __name__ == "__main__":
    root, start_method = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    multiprocessing.set_forkserver_preload(["tests.models"])
    logger = WandbLogger(project="tests", save_dir=root, id="first", reinit=True)
    run = trainer(root, ResMemCallback(memory_for(CallsSelf), log_memory_artifact=True), logger=logger,
                  strategy=DDPStrategy(start_method=start_method), devices=2)
    model = make(CallsSelf)
    run.fit(model, datamodule=Data())
    run.test(model, datamodule=Data(), verbose=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["popen", "fork", "forkserver"])
def test_one_run_is_complete_however_ranks_are_started(start_method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    home = str(tmp_path / "home")
    wandb_names = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": home, "WANDB_CACHE_DIR": home}
    done = run_python(script, tmp_path, start_method, env=os.environ | wandb_names, seconds=170)
    assert done.code == 0, done.output
    assert "did not take" not in done.stderr
    # Under fork, fit and test are processes, and so runs, of their own.
    runs = runs_in(tmp_path)
    assert len(runs) == (2 if start_method == "fork" else 1)
    together = {name for run in runs for name in run.last()}
    assert {"resmem/rows", "resmem/k", "test/acc_resmem", "test/scores.path"} <= together
    assert sum("resmem/rows" in logged for run in runs for logged in run.history) == 1, "one rank logs"
    assert [run.exit_code for run in runs] == [0] * len(runs)
    assert any("memory" in run.artifacts for run in runs)
