"""What people and loggers are told, read back from where the loggers wrote it."""

import csv
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_resmem import (
    FaissIndex,
    GridTuner,
    LocalMemory,
    Regression,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    ResMemWarning,
)
from lightning_resmem.reporting.report import Report
from lightning_resmem.reporting.summary import chosen_flip_rate
from tests.models import CallsSelf, Data, Numbers, Spy, data_for, make, memory_for, trainer

QUICK = GridTuner(k=[3, 5], sigma=[0.1, 0.3], softmax_temperature=[1.0], strength=[1.0])


def scalars(metrics):
    return {name: value.item() for name, value in metrics.items()}


def csv_rows(logger):
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def last_in_csv(logger):
    """The last value of each metric."""
    return {name: float(value) for row in csv_rows(logger) for name, value in row.items() if value}


def events(logger):
    found = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


def last_in_events(logger):
    found = events(logger)
    return {name: found.Scalars(name)[-1].value for name in found.Tags()["scalars"]}


class Run:
    """A model trained, memorized, tuned, tested and validated, with what the trainer said after each."""

    def __init__(self, root, kind=CallsSelf, **options):
        data, self.model, self.callback = data_for(kind), make(kind), ResMemCallback(tuner=QUICK, **options)
        self.csv, self.tensorboard = CSVLogger(root), TensorBoardLogger(root)
        run = trainer(root, self.callback, logger=[self.csv, self.tensorboard])
        run.fit(self.model, datamodule=data)
        self.after_fit, self.step = scalars(run.callback_metrics), run.global_step
        run.test(self.model, datamodule=data, verbose=False)
        self.after_test = scalars(run.callback_metrics)
        self.evaluation = self.callback.evaluation
        run.validate(self.model, datamodule=data, verbose=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def test_the_memorys_numbers_are_metrics(done):
    memory, tuning = done.callback.memory, done.callback.tuning
    found = {name: value for name, value in done.after_fit.items() if name.startswith("resmem/")}
    assert found.pop("resmem/seconds") > 0
    assert found == pytest.approx(
        {
            "resmem/rows": 120,
            "resmem/bytes": memory.stats()["bytes"],
            "resmem/k": memory.params.k,
            "resmem/sigma": memory.params.sigma,
            "resmem/softmax_temperature": memory.params.softmax_temperature,
            "resmem/strength": memory.params.strength,
            "resmem/combined_temperature": 1.0,
            "resmem/tuning_acc_base": tuning.base_score,
            "resmem/tuning_acc_resmem": tuning.score,
            "resmem/tuning_gain": tuning.score - tuning.base_score,
            "resmem/tuning_gain_error": tuning.gain_error,
            "resmem/tuning_rows": 40,
            "resmem/tuning_negative_flip_rate": chosen_flip_rate(tuning),
        }
    )


def test_all_scores_are_metrics(done):
    found = {name: value for name, value in done.after_test.items() if name.startswith("test/")}
    assert found == pytest.approx(done.evaluation.named_scores(), rel=1e-6)
    assert {"test/acc_base", "test/acc_knn", "test/acc_resmem", "test/negative_flip_rate", "test/gain_error"} <= set(
        found
    )


@pytest.mark.parametrize("read", [last_in_csv, last_in_events])
def test_every_logger_has_every_number(done, read):
    found = read(done.csv if read is last_in_csv else done.tensorboard)
    wanted = {**done.after_fit, **done.after_test}
    wanted = {name: value for name, value in wanted.items() if name.startswith(("resmem/", "test/"))}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {name.replace("test/", "val/") for name in wanted if name.startswith("test/")} <= set(found)


def test_numbers_stand_at_the_trainers_step(done):
    found = events(done.tensorboard)
    assert [event.step for event in found.Scalars("resmem/rows")] == [done.step]
    assert {event.step for event in found.Scalars("test/acc_resmem")} == {done.step}
    assert [row["step"] for row in csv_rows(done.csv) if row["resmem/rows"]] == [str(done.step)]


def test_hyperparameters_reach_the_loggers(done):
    params = yaml.safe_load(Path(done.csv.log_dir, "hparams.yaml").read_text())["resmem"]
    assert params["k"] == done.callback.memory.params.k
    assert params["sigma"] == pytest.approx(done.callback.memory.params.sigma)
    assert params["head"] == "head"
    assert params["index"] == "exact"
    assert params["task"] == "multiclass"
    assert params["fingerprint"] == done.callback.memory.provenance["fingerprint"]

    found = events(done.tensorboard)
    assert "hp_metric" not in found.Tags()["scalars"], "it would stand over the user's own"
    assert b"resmem/sigma" in found.summary_metadata["_hparams_/session_start_info"].plugin_data.content


class HasResMem(CallsSelf):
    """Has a hyperparameter of the callback's name."""

    def __init__(self, resmem="mine"):
        super().__init__()
        self.save_hyperparameters()


def test_hyperparameters_of_the_users_are_kept(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    callback, model = ResMemCallback(memory_for(CallsSelf)), make(HasResMem)
    run = trainer(tmp_path, callback, logger=loggers)
    for _ in range(2):  # the second time what is ours is replaced
        run.fit(model, datamodule=Data())
        run.fit_loop.max_epochs += 1
    written = yaml.safe_load(Path(loggers[0].log_dir, "hparams.yaml").read_text())
    for params in (written, loggers[1].hparams):
        assert params["resmem"] == "mine"
        assert params["resmem_memory"]["fingerprint"] == callback.memory.provenance["fingerprint"]
        assert set(params) == {"resmem", "resmem_memory"}


def uneven_data():
    """Where the last class is frequent, in training as in validation and test."""
    data = Data()
    data.train, data.val, data.test = (
        (inputs, torch.where(inputs[:, 2] > 0.8, targets, 3)) for inputs, targets in (data.train, data.val, data.test)
    )
    return data


def test_balanced_accuracy_is_reported_where_classes_are_far_from_uniform(tmp_path):
    log, data, model = CSVLogger(tmp_path), uneven_data(), make(CallsSelf)
    callback = ResMemCallback(tuner=QUICK)
    run = trainer(tmp_path, callback, logger=log)
    run.fit(model, datamodule=data)
    (shown,) = run.test(model, datamodule=data, verbose=False)
    found, tuned = last_in_csv(log), callback.tuning.balanced
    assert found["resmem/tuning_balanced_acc_base"] == pytest.approx(tuned.base)
    assert found["resmem/tuning_balanced_acc_resmem"] == pytest.approx(tuned.choice)
    predictions = callback.module.predictions(list(data.test))
    for name, prediction in predictions._asdict().items():
        wanted = balanced_accuracy_score(data.test[1], prediction.argmax(dim=1))
        assert shown[f"test/balanced_acc_{name}"] == pytest.approx(wanted)
        assert found[f"test/balanced_acc_{name}"] == pytest.approx(wanted)


def test_gains_of_regressions_are_above_0_where_errors_shrink(tmp_path):
    done = Run(tmp_path, Numbers, memory=LocalMemory(Regression()))
    found = last_in_csv(done.csv)
    assert found["resmem/tuning_mse_resmem"] < found["resmem/tuning_mse_base"]
    gain = found["resmem/tuning_mse_base"] - found["resmem/tuning_mse_resmem"]
    assert found["resmem/tuning_gain"] == pytest.approx(gain)
    assert found["test/gain"] == pytest.approx(found["test/mse_base"] - found["test/mse_resmem"])
    assert found["test/gain"] > 0


def test_tensorboard_has_the_plots(done):
    found = events(done.tensorboard)
    plots = {"by_distance", "reliability", "flips"}
    wanted = {"resmem/tuning", *(f"{stage}/{plot}" for stage in ("val", "test") for plot in plots)}
    assert set(found.Tags()["images"]) == wanted
    for name in wanted:
        (image,) = found.Images(name)
        picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        assert picture.shape == (image.height, image.width, 3)
        assert picture.shape[0] > 300
        assert len(np.unique(picture)) > 10, "an empty picture"


def test_recall_is_a_metric_of_an_approximate_index(tmp_path):
    memory = LocalMemory(params=ResMemParams(k=5, sigma=0.2), index=FaissIndex("HNSW8"))
    run = trainer(tmp_path, ResMemCallback(memory))
    run.fit(make(CallsSelf), datamodule=Data())
    assert run.callback_metrics["resmem/recall"].item() == memory.stats()["recall"]


def test_callbacks_with_names_keep_their_numbers_apart(tmp_path):
    log = CSVLogger(tmp_path)
    hidden = ResMemCallback(memory_for(CallsSelf), name="hidden", embedding="body.0", route=False)
    run = trainer(tmp_path, ResMemCallback(LocalMemory(params=ResMemParams(k=9))), hidden, logger=log)
    model = make(CallsSelf)
    run.fit(model, datamodule=Data())
    run.test(model, datamodule=Data(), verbose=False)
    found = last_in_csv(log)
    assert (found["resmem/k"], found["hidden/k"]) == (9, 5)
    assert {"test/acc_resmem", "test/hidden/acc_resmem", "test/hidden/gain"} <= set(found)


def test_several_loaders_are_reported_apart(tmp_path):
    log, data, model = TensorBoardLogger(tmp_path), Data(), make(CallsSelf)
    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf)), logger=log)
    run.fit(model, datamodule=data)
    run.test(model, [data.test_dataloader(), data.val_dataloader()], verbose=False)
    found = events(log).Tags()
    for index in range(2):
        assert f"test/flips/dataloader_idx_{index}" in found["images"]
        assert f"test/brier_resmem/dataloader_idx_{index}" in found["scalars"]


def test_regression_is_reported_without_flips(tmp_path):
    done = Run(tmp_path, Numbers, memory=LocalMemory(Regression()))
    assert set(events(done.tensorboard).Tags()["images"]) == {"resmem/tuning", "val/by_distance", "test/by_distance"}
    assert "resmem/tuning_mse_base" in last_in_csv(done.csv)


def test_validation_in_fit_and_predict_report_nothing(tmp_path):
    log, model = CSVLogger(tmp_path), make(CallsSelf)
    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf)), logger=log, max_epochs=2)
    for _ in range(2):
        run.fit(model, datamodule=Data())
        run.predict(model, datamodule=Data())
        run.fit_loop.max_epochs += 1
    assert not any(name.startswith(("val/", "test/")) for name in last_in_csv(log))


# -- summaries


def run_and_print(root, capsys, verbose=True, **options):
    model, run = make(CallsSelf), trainer(root, ResMemCallback(memory_for(CallsSelf)), **options)
    run.fit(model, datamodule=Data())
    after_fit = capsys.readouterr().out
    run.test(model, datamodule=Data(), verbose=verbose)
    return after_fit, capsys.readouterr().out


def test_summaries_are_printed_when_the_trainer_prints_its_own(tmp_path, capsys):
    after_fit, after_test = run_and_print(tmp_path, capsys, enable_progress_bar=True)
    assert "ResMem memory: 120 rows" in after_fit
    assert "ResMem: test, 50 rows" in after_test
    assert "turned right" in after_test


def test_quiet_trainers_stay_quiet(tmp_path, capsys):
    after_fit, after_test = run_and_print(tmp_path, capsys, verbose=False)
    assert (after_fit, after_test) == ("", "")


def test_summaries_get_along_with_the_rich_bar(tmp_path, capsys):
    model = make(CallsSelf)
    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf)), RichProgressBar(), enable_progress_bar=True)
    run.fit(model, datamodule=Data())
    assert "ResMem memory: 120 rows" in capsys.readouterr().out


# -- loggers that fail


class FailsAtResMem(CSVLogger):
    """Takes what the trainer logs, and nothing of a memory."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("resmem/") or name.endswith("gain_error") for name in metrics):
            raise ConnectionError("network gone")
        super().log_metrics(metrics, step)

    def log_hyperparams(self, params=None):
        raise OSError(28, "No space left on device")


def test_a_failing_logger_costs_neither_memory_nor_reports_elsewhere(tmp_path):
    data, model, callback = Data(), make(CallsSelf), ResMemCallback(memory_for(CallsSelf), dirpath=tmp_path / "memory")
    loggers = [FailsAtResMem(tmp_path / "broken"), CSVLogger(tmp_path / "whole")]
    run = trainer(tmp_path, callback, logger=loggers)
    with pytest.warns(ResMemWarning, match="FailsAtResMem did not take .*: ConnectionError: network gone"):
        run.fit(model, datamodule=data)
    assert len(callback.memory) == len(LocalMemory.load(tmp_path / "memory")) == 120
    with pytest.warns(ResMemWarning, match="FailsAtResMem did not take scores: ConnectionError: network gone"):
        (shown,) = run.test(model, datamodule=data, verbose=False)
    assert shown["test/acc_resmem"] == last_in_csv(loggers[1])["test/acc_resmem"]
    assert {"resmem/rows", "test/gain_error"} <= set(last_in_csv(loggers[1]))


class Vanishing:
    """A log directory with a file in its place, for a while."""

    def __init__(self, logger):
        self.logger = logger

    def go(self, *_):
        self.path = Path(self.logger.log_dir)
        self.path.rename(self.path.with_suffix(".away"))
        self.path.write_text("in the way")

    def come_back(self, *_):
        self.path.unlink()
        self.path.with_suffix(".away").rename(self.path)


def test_a_log_directory_that_is_gone_for_a_while(tmp_path):
    log, model, callback = CSVLogger(tmp_path), make(CallsSelf), ResMemCallback(memory_for(CallsSelf))
    vanishing = Vanishing(log)
    spies = Spy("on_train_end", vanishing.go), Spy("on_fit_end", vanishing.come_back)
    run = trainer(tmp_path, *spies, callback, logger=log)
    with pytest.warns(ResMemWarning, match="CSVLogger did not take the memory's hyperparameters: "):
        run.fit(model, datamodule=Data())
    assert len(callback.memory) == 120
    assert last_in_csv(log)["resmem/rows"] == 120, "the logger tries again when the trainer asks it to"


def test_a_log_directory_that_stays_away_ends_fit_in_the_trainer_with_everything_saved(tmp_path):
    log, model = CSVLogger(tmp_path / "logs"), make(CallsSelf)
    callback = ResMemCallback(memory_for(CallsSelf), dirpath=tmp_path / "memory")
    run = trainer(tmp_path, Spy("on_train_end", Vanishing(log).go), callback, logger=log)
    # The trainer saves loggers at the end of fit, with or without a memory.
    with pytest.warns(ResMemWarning), pytest.raises((OSError, RuntimeError)):
        run.fit(model, datamodule=Data())
    assert len(callback.module.memory) == 120
    again = ResMemModule.load(tmp_path / "memory", model)
    assert torch.equal(again.memory.ids, callback.memory.ids)


def test_a_memory_that_cannot_be_described_is_told_of(tmp_path, monkeypatch):
    def fail(memory):
        raise OSError("shard 2 does not answer")

    monkeypatch.setattr(LocalMemory, "stats", fail)
    with pytest.warns(ResMemWarning, match="the memory is not reported: OSError: shard 2 does not answer"):
        Report().memorized(trainer(tmp_path), LocalMemory(), None, 1.0, None)


def test_an_artifact_needs_someone_to_take_it(tmp_path):
    run = trainer(tmp_path, ResMemCallback(memory_for(CallsSelf), log_memory_artifact=True), logger=CSVLogger(tmp_path))
    with pytest.warns(ResMemWarning, match="no WandbLogger"):
        run.fit(make(CallsSelf), datamodule=Data())


def test_reports_travel_without_their_datasets():
    report = Report("mine")
    report._memory_loaders = DataLoader([lambda: None])  # cannot be pickled
    assert pickle.loads(pickle.dumps(report))._name == "mine"
