"""The examples run as their own help says."""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from threadpoolctl import threadpool_limits

from examples import diamonds
from tests.interpreters import run_python

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = pytest.mark.slow


def run(directory: Path, script: str, *arguments: str, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RESMEM_FEATURES"}
    environment |= {"COLUMNS": "100"}
    done = run_python(ROOT / "examples" / script, *arguments, cwd=directory, env=environment)
    assert done.code == code, done.output
    return done.output


def test_digits(tmp_path):
    printed = run(tmp_path, "digits.py", "--seeds", "2", "--epochs", "4", "--hidden", "8")
    numbers = re.search(r"mean\W+([\d.]+)\W+([\d.]+)\W+([\d.]+)\W+?([+-][\d.]+)", printed)
    base, knn, resmem, gain = map(float, numbers.groups())
    assert 0.5 < base < 1
    assert 0.5 < knn < 1
    assert resmem - base == pytest.approx(gain, abs=2e-4)
    assert (tmp_path / "outputs" / "digits.png").read_bytes().startswith(PNG)


def test_digits_refuses_nonsense(tmp_path):
    assert "at least 1" in run(tmp_path, "digits.py", "--seeds", "0", code=2)


def test_diamonds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    picture = tmp_path / "outputs" / "diamonds.png"
    diamonds.main(["--seeds", "2", "--epochs", "2", "--hidden", "16", "--rows", "5000", "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "Trainer(callbacks=[resmem])" in printed.split("Root mean squared error")[0]
    numbers = re.search(r"mean\W+([\d.]+)\W+([\d.]+)\W+([\d.]+)\W+?(-?[\d.]+)%", printed)
    base, knn, resmem, below = map(float, numbers.groups())
    assert 300 < resmem <= min(base, 2000)
    assert 300 < knn < 2000
    assert 100 * (1 - resmem / base) == pytest.approx(below, abs=1)
    assert picture.read_bytes().startswith(PNG)


def test_label_errors(tmp_path):
    printed = run(tmp_path, "label_errors.py", "--seeds", "1")
    found = re.findall(r"(stopped early|interpolating)\W+mean\W+([\d.]+)\W+([\d.]+)\W+([\d.]+)\W+([\d.]+)", printed)
    assert [network for network, *_ in found] == ["stopped early", "interpolating"]
    assert all(float(shares[-1]) >= 0.5 for _, *shares in found)


def test_memory_pass(tmp_path):
    printed = run(tmp_path, "benchmarks/memory_pass.py", "--share", "0.01", "--repeats", "1")
    assert len(re.findall(r"\d+\.\d+ +│ +\d+\.\d+ +│ +\d+\.\d{3} ", printed)) == 3


def test_gpu_search_on_a_cpu(tmp_path, monkeypatch):
    script, out = ROOT / "examples" / "benchmarks" / "gpu_search.py", tmp_path / "tables" / "card.md"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [script.name, "--device", "cpu", "--small", "--rounds", "1", "--out", str(out)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    written = out.read_text()
    exact = re.findall(r"\| (ours|addmm \+ topk|cdist \+ topk) \| [\d.e+]+ \| [\d.]+ \| 100\.000% \|", written)
    assert sorted(set(exact)) == ["addmm + topk", "cdist + topk", "ours"]
    for call in ("search", "memory(queries)", "predict", "copy, bytes read and written"):
        assert f"| {call} |" in written


def test_gpu_search_from_few_to_many_keys(tmp_path):
    printed = run(tmp_path, "benchmarks/gpu_search.py", "--device", "cpu", "--small", "--grid", "--rounds", "1")
    assert len(re.findall(r"[\d.]+ / [\d.]+", printed)) == 4


def test_tabular(capsys):
    from examples import tabular

    with threadpool_limits(1):  # of the trees, which so few rows gain nothing from
        tabular.main(["--rows", "120", "--seeds", "1", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert re.findall(r"│ (price|cut) +│ (MLP|trees) ", printed) == [
        ("price", "MLP"),
        ("price", "trees"),
        ("cut", "MLP"),
        ("cut", "trees"),
    ]
    assert len(re.findall(r"\d\.\d\d", printed)) == 20


def test_image_folder(tmp_path, capsys):
    from examples import image_folder

    picture = tmp_path / "neighbours.png"
    image_folder.main(["--count", "100", "--epochs", "1", "--size", "8", "--plot", str(picture)])
    assert re.search(r"\d+ of 2\d predictions changed", capsys.readouterr().out)
    assert picture.read_bytes().startswith(PNG)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(picture.read_bytes())
    with pytest.raises(SystemExit):
        image_folder.main(["--data", str(tmp_path)])
    assert "1 images in 1 class folders" in capsys.readouterr().err


def test_forecasting(capsys):
    from examples import forecasting

    forecasting.main(["--seeds", "1", "--epochs", "1", "--cities", "3"])
    numbers = re.search(r"mean │ " + r" │ ".join([r"\s*([\d.]+)"] * 4), capsys.readouterr().out)
    base, knn, resmem, growing = map(float, numbers.groups())
    assert growing < resmem < base
    assert knn > 0
