"""Progress bars of what takes long."""

import re

import pytest

from lightning_resmem import ResMemCallback
from lightning_resmem.progress import progress_bar, shows_progress, working
from tests.models import CallsSelf, Data, make, trainer


def test_a_bar_counts(capsys):
    with progress_bar(True, "reading", 3) as advance:
        for _ in range(3):
            advance()
    assert re.search(r"ResMem: reading .* 3/3", capsys.readouterr().err)


def test_a_step_without_an_end_shows_its_time(capsys):
    with working(True, "building"):
        pass
    assert re.search(r"ResMem: building .*0:00:00", capsys.readouterr().err)


def test_errors_pass_through(capsys):
    with pytest.raises(KeyError), working(True, "building"):
        raise KeyError
    assert "building" in capsys.readouterr().err


def test_nothing_is_shown_unasked(capsys):
    with progress_bar(False, "reading", 3) as advance, working(False, "building"):
        advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("enabled", [True, False])
def test_the_trainer_decides(enabled, tmp_path, capsys):
    run = trainer(tmp_path, ResMemCallback(dirpath=tmp_path / "memory"), enable_progress_bar=enabled)
    assert shows_progress(run) == enabled
    run.fit(make(CallsSelf), datamodule=Data())
    shown = capsys.readouterr().err
    steps = ["collecting training rows", "building the memory", "collecting validation rows", "tuning", "saving the"]
    assert [f"ResMem: {step}" in shown for step in steps] == [enabled] * len(steps)
