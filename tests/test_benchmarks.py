"""What the benchmarks share."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets

from lightning_resmem import GridTuner
from lightning_resmem.memory.search.exact import ExactIndex


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    import _harness

    return _harness


def test_queries_are_drawn_from_all_classes(harness, monkeypatch, tmp_path):
    classes = np.repeat(np.arange(10), 200)  # sorted, as in the files that are made of the test images
    rows = np.tile(classes[:, None], 64).astype(np.float16)
    np.savez(tmp_path / "features.npz", train_embeddings=rows, test_embeddings=rows)
    monkeypatch.setenv("RESMEM_FEATURES", str(tmp_path / "features.npz"))
    _, queries, _ = harness.features()
    assert queries.shape == (1000, 64)
    assert torch.bincount(queries[:, 0].long(), minlength=10).min() > 60
    assert torch.equal(queries, harness.features()[1])


def test_search_without_numba(harness):
    keys = torch.randn(300, 8)
    with harness.without_numba():
        distances, ids = ExactIndex(keys).search(keys[:5], 1)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert distances.max() == 0


def keep_sets(monkeypatch, *names):
    from real_data import SETS

    for name in SETS.keys() - set(names):
        monkeypatch.delitem(SETS, name)


def test_a_line_for_every_data_set(harness, monkeypatch, tmp_path):
    import real_data

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setattr(real_data, "STEPS", 60)
    monkeypatch.setattr(real_data, "ALTERNATIVES", ("wine",))
    keep_sets(monkeypatch, "wine", "diabetes")
    real_data.main(["--only", "diabetes", "--seeds", "1"])
    assert [*tmp_path.iterdir()] == [], "the documentation's table is replaced by a whole one only"
    real_data.main(["--seeds", "2"])
    _, _, wine, diabetes = (tmp_path / "real_data.md").read_text().splitlines()
    for line, name, least, most in ((wine, "wine", 85, 100), (diabetes, "diabetes", 40, 90)):
        base, knn, resmem = (float(cell.split(" ± ")[0]) for cell in line.split(" | ")[2:5])
        assert line.startswith(f"| {name} |")
        assert least < min(base, knn, resmem) <= max(base, knn, resmem) <= most
    others = (tmp_path / "real_data_others.md").read_text()
    for kind in ("kNN-LM", "stacking", "temperature scaling", "4 times longer", "4 times wider"):
        assert f"| wine | {kind} |" in others


def few_digits():
    x, y = datasets.load_digits(return_X_y=True)
    return x[:240], y[:240]


def test_two_layers_beside_the_better_one(harness, monkeypatch, tmp_path):
    import blended
    import real_data

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setitem(real_data.SETS, "digits", few_digits)
    monkeypatch.setattr(blended, "SHARES", (0.5,))
    monkeypatch.setattr(blended, "STRENGTHS", (1.0,))
    keep_sets(monkeypatch, "digits")
    blended.main(["--seeds", "1", "--steps", "20"])
    _, _, *lines = (tmp_path / "blended.md").read_text().splitlines()
    for line, name in zip(lines, ("digits", "digits, convolutions"), strict=True):
        base, auto, both, evident, beyond, _ = (float(cell.split(" ± ")[0]) for cell in line.split(" | ")[1:7])
        assert line.startswith(f"| {name} |")
        assert evident == (both if line.endswith("1 of 1 |") else auto)
        assert both == pytest.approx(auto + beyond, abs=0.011)
        assert base + both > 50


def test_two_layers_are_kept_only_where_they_are_evidently_better(harness):
    from blended import Tried, best, is_evident

    rows = torch.tensor([1.0, 0.0, 0.0, 0.0])
    lower, higher = Tried(rows, rows, rows), Tried(rows, rows, rows + torch.tensor([0.1, 0.2, 0.1, 0.2]))
    assert is_evident(higher, lower)
    assert not is_evident(lower, higher)
    assert not is_evident(Tried(rows, rows.flip(0), rows), lower)  # right for another row
    assert best([lower, higher]) is higher


def test_rows_that_were_held_out(harness, monkeypatch, tmp_path):
    import held_out_rows
    import real_data

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setitem(real_data.SETS, "digits", few_digits)
    monkeypatch.setattr(held_out_rows, "NAMES", ("digits",))
    held_out_rows.main(["--seeds", "1", "--steps", "60"])
    (line,) = (tmp_path / "held_out_rows.md").read_text().splitlines()[2:]
    _, left, base, training, _, both, _ = (re.findall(r"-?[\d.]+", cell)[:1] for cell in line.split(" | "))
    assert float(left[0]) < 10  # it knows the rows that it was trained on
    assert float(base[0]) > 80
    assert float(training[0]) == 0  # they say nothing
    assert float(base[0]) + float(both[0]) > 80


def test_a_line_for_every_network_and_metric(harness, monkeypatch, tmp_path, capsys):
    import cifar_features

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    cifar_features.main([])
    assert "--data FOLDER" in capsys.readouterr().out
    generator = np.random.default_rng(0)
    arrays = {}
    for part, rows in (("train", 400), ("val", 100), ("test", 300)):
        labels = generator.integers(0, 3, rows)
        embeddings = np.eye(8)[labels] + generator.normal(0, 0.3, (rows, 8))
        logits = 3 * np.eye(3)[np.where(generator.random(rows) < 0.5, labels, 0)]  # half of them say nothing
        arrays |= {f"{part}_embeddings": embeddings, f"{part}_logits": logits, f"{part}_labels": labels}
    np.savez(tmp_path / "cifar3_resnet8_features.npz", **arrays)
    cifar_features.main(["--data", str(tmp_path), "--plot", str(tmp_path / "picture.png")])
    _, _, *lines = (tmp_path / "cifar_features.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| CIFAR-3, ResNet-8", metric] for metric in ("euclidean", "within_class")
    ]
    for line in lines:
        base, _, resmem = (float(cell.split(" ± ")[0]) for cell in line.split(" | ")[2:5])
        right = arrays["test_logits"].argmax(axis=1) == arrays["test_labels"]
        assert base == pytest.approx(100 * right.mean(), abs=0.01)
        assert resmem > base + 10
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_memory_of_tokens(harness, monkeypatch, tmp_path):
    import tokens

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setattr(tokens, "alone", lambda case, share: case(share))  # a process of their own would take seconds
    tokens.main(["--share", "0.001"])
    measured = dict(line.strip("| ").split(" | ") for line in (tmp_path / "tokens.md").read_text().splitlines())
    assert measured["4,000 tokens, D = 128, V = 1,100, m = 16, float16 keys: held"] == "0.00 GB"
    assert any(what.startswith("memory pass over 128 tokens") for what in measured)
    assert "the base within `combined()`, more than alone" in measured
    _, _, every, _, *samples = (tmp_path / "token_samples.md").read_text().splitlines()
    assert every.startswith("| 388, all, float32 keys | ")
    assert [line.split(",")[:2] for line in samples[:2]] == [["| 194", " uniform"], ["| 194", " residual"]]


def test_base_and_memory_of_a_text(harness, monkeypatch, tmp_path, capsys):
    import language

    monkeypatch.setattr(harness, "TABLES", tmp_path)
    monkeypatch.setattr(language, "SIZES", (0.2, 0.8))
    monkeypatch.setattr(language, "TUNER", GridTuner([10], [0.2], [1.0], [0.5, 1.0]))
    (tmp_path / "text.txt").write_text(" the cat sat on" * 220)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = ["--text", str(tmp_path / "text.txt"), "--epochs", "1", "--width", "8", "--tokens", "1950"]
    language.main([*small, "--seeds", "2"])
    language.main([*small, "--seeds", "1", "--unseen"])
    torch.set_num_threads(threads)
    _, _, *lines = (tmp_path / "language_256.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {name}" for name in ("base", "knn", "knn_lm", "resmem", "b = 0", "b = a", "b free")
    ]
    of_base, *_ = nll = [float(line.split(" | ")[1]) for line in lines]
    assert max(nll[1:]) < of_base - 1  # the text repeats itself
    for line, loss in zip(lines[1:], nll[1:], strict=True):
        assert float(line.split(" | ")[2].split(" ± ")[0]) == pytest.approx(of_base - loss, abs=2e-4)
    assert capsys.readouterr().out.count("b free: a 0.8, b ") == 3
    assert "| resmem |" in (tmp_path / "language_256_unseen.md").read_text()


def test_an_error_is_that_of_seeds_or_of_blocks(harness):
    from language import summary

    assert summary(torch.tensor([[0.0, 2.0], [0.0, 2.0]]), 2) == "1.00 ± 1.00"
    assert summary(torch.tensor([[0.0, 0.0], [2.0, 2.0]]), 2) == "1.00 ± 1.00"
    assert summary(torch.tensor([[1.0]]), 2) == "1.00 ± nan"
