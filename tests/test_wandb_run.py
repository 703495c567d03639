"""The Weights & Biases example runs offline, and takes whatever the sweep gives it."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml

from tests.interpreters import run_python
from tests.wandb_records import runs_in

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "wandb_run.py"
SWEEP = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parser():
    specification = importlib.util.spec_from_file_location("wandb_run", PROGRAM)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.make_parser()


def candidates(parameter):
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def test_the_sweep_starts_this_program():
    assert ROOT / SWEEP["program"] == PROGRAM
    assert SWEEP["method"] in ("bayes", "grid", "random")
    assert SWEEP["command"][-1] == "${args}"


@pytest.mark.parametrize("name", SWEEP["parameters"])
def test_the_program_takes_every_value_of_the_sweep(parser, name):
    for value in candidates(SWEEP["parameters"][name]):
        options = parser.parse_args([*SWEEP["command"][3:-1], f"--{name}={value}"])
        assert getattr(options, name) == value


@pytest.mark.slow
def test_a_trial_of_the_sweep_has_its_metric(tmp_path):
    last = {name: candidates(parameter)[-1] for name, parameter in SWEEP["parameters"].items()} | {"epochs": 2}
    environment = os.environ | {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(tmp_path)}
    arguments = [f"--{name}={value}" for name, value in last.items()]
    done = run_python(PROGRAM, *arguments, cwd=tmp_path, env=environment)
    assert done.code == 0, done.output
    (run,) = runs_in(tmp_path / "outputs")
    assert run.exit_code == 0
    assert 0.5 < run.summary[SWEEP["metric"]["name"]] <= 1
    assert {name: run.config[name] for name in last} == last
    assert "memory" in run.artifacts
    assert {"test/acc_base", "test/acc_knn", "test/acc_resmem"} <= run.last().keys()
    assert "wandb sync outputs/wandb/offline-run-" in done.stdout
