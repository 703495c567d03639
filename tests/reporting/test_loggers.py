"""Loggers are told, each on its own: one that fails is warned about."""

import builtins
import importlib.util

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_resmem import ResMemWarning
from lightning_resmem.reporting.loggers import _has_matplotlib, each_logger, log_figures, log_metrics, warn_only
from tests.models import trainer


class Recorder(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.metrics, self.params = [], []

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        self.metrics.append((metrics, step))

    def log_hyperparams(self, params):
        self.params.append(params)


class Failing(Recorder):
    def log_metrics(self, metrics, step=None):
        raise OSError(28, "No space left on device")


def test_errors_become_warnings_that_say_what_is_safe():
    wanted = r"X is missing: KeyError: 'y'. The model and its memory are not affected"
    with pytest.warns(ResMemWarning, match=wanted), warn_only("X is missing"):
        raise KeyError("y")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_who_wants_to_stop_stops(error):
    with pytest.raises(error), warn_only("X is missing"):
        raise error


def test_one_failure_keeps_nothing_from_the_others(tmp_path):
    before, after = Recorder(), Recorder()
    run = trainer(tmp_path, logger=[before, Failing(), after])
    with pytest.warns(ResMemWarning, match="Failing did not take scores: OSError: .*No space left on device"):
        log_metrics(run, "scores", {"a": 1.0})
    assert before.metrics == after.metrics == [({"a": 1.0}, 0)]


def test_nothing_is_told_where_there_is_nothing(tmp_path):
    recorder = Recorder()
    log_metrics(trainer(tmp_path, logger=recorder), "scores", {})
    assert recorder.metrics == []


def test_only_rank_zero_tells(tmp_path, monkeypatch):
    recorder = Recorder()
    run = trainer(tmp_path, logger=recorder)
    monkeypatch.setattr(type(run), "is_global_zero", False)
    each_logger(run, "x", lambda logger: logger.log_metrics({}))
    assert recorder.metrics == []


def test_figures_are_drawn_only_for_who_takes_them(tmp_path):
    def draw(plots):
        raise AssertionError("drawn for nobody")

    log_figures(trainer(tmp_path, logger=[CSVLogger(tmp_path), Recorder()]), {"x": draw})
    log_figures(trainer(tmp_path), {"x": draw})


def test_a_plot_that_fails_is_told_of_and_the_next_is_drawn(tmp_path):
    drawn = []

    def fail(plots):
        raise ZeroDivisionError

    with pytest.warns(ResMemWarning, match="the plot x was not drawn: ZeroDivisionError"):
        log_figures(trainer(tmp_path, logger=TensorBoardLogger(tmp_path)), {"x": fail, "y": drawn.append})
    assert len(drawn) == 1


def test_without_matplotlib_there_are_no_plots_and_one_hint(tmp_path, monkeypatch, caplog):
    real_find, real_import = importlib.util.find_spec, builtins.__import__

    def find(name, *args):
        return None if name == "matplotlib" else real_find(name, *args)

    def refuse(name, *args, **kwargs):
        assert not name.startswith("matplotlib"), "imported although it is not there"
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(builtins, "__import__", refuse)
    _has_matplotlib.cache_clear()
    try:
        run = trainer(tmp_path, logger=TensorBoardLogger(tmp_path))
        with caplog.at_level("INFO"):
            for _ in range(2):
                log_figures(run, {"x": lambda plots: pytest.fail("drawn")})
    finally:
        _has_matplotlib.cache_clear()
    assert [record.message for record in caplog.records if "matplotlib" in record.message] == [
        'ResMem: no plots without matplotlib: pip install "lightning-resmem[plots]".'
    ]
