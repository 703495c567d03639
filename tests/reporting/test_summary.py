"""Summaries say what was measured, and only that."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from lightning_resmem import ResMemParams, TuningResult
from lightning_resmem.metrics.bins import Neighborhoods
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.reporting.summary import evaluation_summary, memory_summary, score_rows
from lightning_resmem.tuning.balance import BalancedScore

STATS = {"rows": 45000, "bytes": 3 * 2**20, "index": "exact"}


def printed(parts):
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def tuned(score=0.8084):
    params = ResMemParams(k=100, sigma=0.15)
    row = {"k": 100, "sigma": 0.15, "softmax_temperature": 1.0, "strength": 1.0, "negative_flip_rate": 0.0142}
    return TuningResult(
        params, [{**row, "k": 50, "negative_flip_rate": 0.5}, row], 0.796, score, "acc", rows=5000, gain_error=0.0027
    )


def evaluation(scores):
    return Evaluation("test", "/dataloader_idx_1", 10000, scores, (), 0.0102, 0.002, (), {}, Neighborhoods(*[None] * 3))


def test_after_memorizing():
    text = printed(memory_summary(STATS, 12.34, tuned()))
    for words in (
        "5,000 validation rows",
        "0.7960",
        "0.8084",
        "+0.0124 ± 0.0027",
        "k=100, sigma=0.15",
        "right 2.66%, turned wrong 1.42%",
    ):
        assert words in text
    assert "memory: 45,000 rows, 3.0 MiB, index exact, filled in 12.3 s" in text


def test_tuning_knows_no_knn():
    (header,) = [line for line in printed(memory_summary(STATS, 1.0, tuned())).splitlines() if "base" in line]
    assert header.replace("┃", " ").split() == ["base", "resmem", "gain"]


@pytest.mark.parametrize(("leave_one_out", "kind"), [(False, "validation"), (True, "memorized")])
def test_one_row_is_no_rows(leave_one_out, kind):
    one = dataclasses.replace(tuned(), rows=1, leave_one_out=leave_one_out)
    stats = {**STATS, "rows": 1, "shards": [{"shard": 0}]}
    text = printed(memory_summary(stats, 1.0, one))
    assert f"tuned on 1 {kind} row\n" in re.sub(" +\n", "\n", text)
    assert "memory: 1 row, 3.0 MiB, index exact, 1 shard, filled" in text
    single = dataclasses.replace(evaluation({"acc_base": 1.0, "acc_knn": 1.0, "acc_resmem": 1.0}), rows=1)
    assert "dataloader_idx_1, 1 row\n" in re.sub(" +\n", "\n", printed(evaluation_summary(single, stats)))


def test_without_tuning_there_is_no_table():
    assert printed(memory_summary(STATS, 1.0, None)).count("\n") == 1


def test_recall_and_shards_where_there_are_any():
    stats = {**STATS, "recall": 0.984, "shards": [{"shard": shard} for shard in (0, 0, 1, 1, 2, 2)]}
    assert "recall 0.984, 3 shards" in printed(memory_summary(stats, 1.0, None))
    assert "recall" not in printed(memory_summary({**STATS, "recall": None}, 1.0, None))


def test_after_a_run():
    scores = {
        **{"acc_base": 0.7945, "acc_knn": 0.78, "acc_resmem": 0.8047},
        **{"ece_base": 0.067, "ece_knn": 0.05, "ece_resmem": 0.032},
        **{
            "top5_base": 0.9,
            "top5_knn": 0.9,
            "top5_resmem": 0.9,
            "mine_base": 1.0,
            "mine_knn": 2.0,
            "mine_resmem": 3.0,
        },
        **{"positive_flip_rate": 0.0244, "negative_flip_rate": 0.0142, "gain": 0.0102, "gain_error": 0.002},
    }
    text = printed(evaluation_summary(evaluation(scores), STATS))
    assert "test/dataloader_idx_1, 10,000 rows" in text
    for name, *numbers in (
        ("accuracy", "0.7945", "0.7800", "0.8047", "+0.0102 ± 0.0020"),
        ("calibration error", "0.0670", "0.0500", "0.0320", "+0.0350"),
        ("top-5 accuracy", "0.9000", "+0.0000"),
        ("mine", "3.0000", "+2.0000"),
    ):
        (line,) = [line for line in text.splitlines() if line.split("│")[1:2] == [f" {name:<17} "]]
        assert all(number in line for number in numbers)
    assert "turned right 2.44%, turned wrong 1.42%" in text


def test_regression_has_no_flips():
    text = printed(evaluation_summary(evaluation({"mse_base": 2.0, "mse_knn": 1.0, "mse_resmem": 1.5}), STATS))
    assert "mean squared error" in text
    assert "turned" not in text


def test_every_gain_is_above_0_if_something_gets_better():
    """Also where less is better: of errors, of losses, and of the user's own metrics that say so."""
    scores = {"mse_base": 2.0, "mse_knn": 1.0, "mse_resmem": 1.5, "mine_base": 3.0, "mine_knn": 3.0, "mine_resmem": 1.0}
    found = dataclasses.replace(evaluation(scores), less_is_better=("mse", "mine"))
    lines = printed(evaluation_summary(found, STATS)).splitlines()
    for name, gain in (("mean squared error", "+0.5000"), ("mine", "+2.0000")):
        assert [gain in line for line in lines if f" {name} " in line] == [True]
    regression = dataclasses.replace(tuned(), base_score=2.0, score=1.5, score_name="mse")
    assert "+0.5000 ± 0.0027" in printed(memory_summary(STATS, 1.0, regression))
    assert regression.gain == 0.5
    assert "mse 2.0000 -> 1.5000 (+0.5000 ± 0.0027)" in regression.summary()


def balanced(base, resmem, shown):
    scores = {f"{stem}_{name}": 0.5 for stem in ("acc", "balanced_acc") for name in ("base", "knn", "resmem")}
    scores |= {"balanced_acc_base": base, "balanced_acc_resmem": resmem}
    names = ("acc_base", "balanced_acc_base") if shown else ("acc_base",)
    return printed(evaluation_summary(dataclasses.replace(evaluation(scores), shown=names), STATS))


def test_balanced_accuracy_stands_beside_accuracy():
    hint = 'falls while accuracy does not: GridTuner(objective="balanced_accuracy") keeps it'
    text = balanced(0.584, 0.528, shown=True)
    assert re.search(r"balanced accuracy .* 0.5840 .* 0.5280 .* -0.0560", text)
    assert hint in text
    assert hint not in balanced(0.528, 0.584, shown=True)
    assert hint not in balanced(0.584, 0.528, shown=False), "classes are near uniform"
    found = BalancedScore(base=0.584, choice=0.528, error=0.012, uneven=True, falls=True)
    text = printed(memory_summary(STATS, 1.0, dataclasses.replace(tuned(), balanced=found)))
    assert re.search(r"balanced accuracy .* 0.5840 .* 0.5280 .* -0.0560 ± 0.0120", text)
    several = dataclasses.replace(tuned(), balanced=found._replace(score="f1"))
    assert re.search(r"macro F1 .* 0.5840 .* 0.5280 .* -0.0560 ± 0.0120", printed(memory_summary(STATS, 1.0, several)))
    near = dataclasses.replace(tuned(), balanced=found._replace(uneven=False))
    assert "balanced" not in printed(memory_summary(STATS, 1.0, near))


@pytest.mark.parametrize("name", ["[/b]", "[red]x", ":dog:", "$x_$"])
def test_names_are_no_markup(name):
    found = evaluation({f"{name}_{prediction}": 0.5 for prediction in ("base", "knn", "resmem")})
    text = printed(evaluation_summary(dataclasses.replace(found, prefix=f"test/{name}"), {**STATS, "index": name}))
    assert f"ResMem: test/{name}/dataloader_idx_1, 10,000 rows" in text
    assert f"│ {name} " in text
    assert f"index {name}" in text
    assert f"index {name}" in printed(memory_summary({**STATS, "index": name}, 1.0, None))


def test_only_scores_of_all_three_stand_side_by_side():
    scores = {"acc_base": 1.0, "acc_knn": 2.0, "acc_resmem": 3.0, "nll_base": 1.0, "gain": 2.0}
    assert score_rows(scores) == [("acc", pytest.approx([1.0, 2.0, 3.0]))]
