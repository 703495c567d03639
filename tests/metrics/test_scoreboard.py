"""Each row counted once, padding not at all, over batches and loaders."""

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from lightning_resmem import InputError, Predictions, ResMemWarning
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.metrics import scoreboard
from lightning_resmem.metrics.scoreboard import Scoreboard
from tests.metrics.runs import CLASSES, answer, evaluate, loader_of, memory_of
from tests.models import trainer


def test_batches_of_different_sizes(tmp_path):
    board = Scoreboard(memory_of(), "test", [loader_of(4)])
    board.update(answer([0, 1, 2], [0, 1, 1], [0, 1, 0]), torch.tensor([0, 1, 0]))
    board.update(answer([2], [0], [2]), torch.tensor([2]))
    (found,) = evaluate(board, tmp_path)
    assert (found.prefix, found.suffix, found.rows) == ("test", "", 4)
    assert found.gain == found.scores["gain"] == 0.25
    wanted = {"test/acc_base": 3 / 4, "test/acc_knn": 2 / 4, "test/acc_resmem": 1.0, "test/positive_flip_rate": 0.25}
    assert {name: found.shown_scores()[name] for name in wanted} == wanted
    assert found.named_scores().items() >= found.shown_scores().items()
    assert "test/f1_base" in found.named_scores()
    assert "test/f1_base" not in found.shown_scores()
    assert all(type(value) is float for value in found.scores.values())
    assert repr(found).startswith("Evaluation('test', rows=4, acc_base=0.7500, acc_knn=0.5000, acc_resmem=1.0000, ")
    assert repr(found).endswith(f"gain=+0.2500 ± {found.gain_error:.4f}; {len(found.scores)} scores, 1 flips)")
    assert set(found.reliability) == {"base", "knn", "resmem"}
    assert found.reliability["resmem"].counts.sum() == found.neighborhoods.counts.sum() == 4


def test_rows_asked_at_one_time_are_independent(tmp_path):
    rows = answer([0, 1, 2], [0, 1, 1], [0, 1, 0]), torch.tensor([0, 1, 0])
    at_once, apart = (Scoreboard(memory_of(), "test", [loader_of(3)]) for _ in range(2))
    at_once.update(*rows, asked_at=torch.tensor(20.0, dtype=torch.float64))
    apart.update(*rows)
    (found,), (expected,) = evaluate(at_once, tmp_path), evaluate(apart, tmp_path)
    assert found.gain_error == expected.gain_error > 0


def test_every_gain_is_above_0_if_resmem_is_better(tmp_path):
    own = {"error": MulticlassCalibrationError(CLASSES)}
    board = Scoreboard(memory_of(), "test", [loader_of(3)], metrics=own)
    board.update(answer([0, 0, 0], [0, 1, 0], [0, 1, 0]), torch.tensor([0, 1, 0]))
    (found,) = evaluate(board, tmp_path)
    names = [name.removesuffix("_base") for name in found.scores if name.endswith("_base")]
    assert {"acc", "balanced_acc", "nll", "brier", "ece", "f1", "error"} == set(names)
    assert all(found.gain_in(name) > 0.1 for name in names)
    assert found.gain_in("acc") == pytest.approx(found.gain) == pytest.approx(1 / 3)
    assert found.gain_in("nll") == found.scores["nll_base"] - found.scores["nll_resmem"]


def test_balanced_accuracies_are_logged_where_classes_are_far_from_uniform(tmp_path):
    for targets, logged in (([0] * 20 + [1, 2], True), ([0, 1, 2] * 7, False)):
        board = Scoreboard(memory_of(), "test", [loader_of(len(targets))])
        board.update(answer(targets, targets, [0] * len(targets)), torch.tensor(targets))
        (found,) = evaluate(board, tmp_path)
        assert found.scores["balanced_acc_resmem"] == pytest.approx(1 / 3)
        assert ("test/balanced_acc_resmem" in found.shown_scores()) is logged


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # of torchmetrics, for a rank without rows
@pytest.mark.parametrize("batch_sizes", [(1,) * 6, (2, 2, 2), (4, 2), (6,)])
@pytest.mark.parametrize(("rows", "ranks", "rank"), [(11, 2, 0), (11, 2, 1), (2, 3, 1), (2, 3, 2), (1, 6, 0)])
def test_padding_is_not_counted(batch_sizes, rows, ranks, rank, tmp_path):
    """All true rows are right and all padded rows wrong."""
    true = len(range(rank, rows, ranks))
    right = [0 if row < true else 1 for row in range(6)]
    board, start = Scoreboard(memory_of(), "test", [loader_of(rows, ranks, rank)]), 0
    for size in batch_sizes:
        part = right[start : start + size]
        board.update(answer(part, part, part), torch.zeros(size, dtype=torch.int64))
        start += size
    (found,) = evaluate(board, tmp_path)
    assert found.rows == true
    if true:
        assert {found.scores[f"acc_{name}"] for name in Predictions._fields} == {1.0}


def test_dataloaders_are_kept_apart(tmp_path):
    board = Scoreboard(memory_of(), "test", [loader_of(2), loader_of(3, ranks=2, rank=1)])
    for labels in ([0], [1]):
        board.update(answer(labels, labels, labels), torch.tensor([0]), dataloader_idx=0)
    board.update(answer([1, 2], [1, 2], [1, 2]), torch.tensor([1, 0]), dataloader_idx=1)
    first, second = evaluate(board, tmp_path)
    assert first.shown_scores()["test/acc_base/dataloader_idx_0"] == 0.5
    assert second.named_scores()["test/gain/dataloader_idx_1"] == 0.0
    assert second.scores["acc_resmem"] == 1.0
    with pytest.raises(IndexError):
        board.update(answer([0], [0], [0]), torch.tensor([0]), dataloader_idx=2)


def test_targets_are_checked(tmp_path):
    for targets, message in ((torch.tensor([3]), "targets holds 3"), (torch.tensor([1.0]), "dtype torch.float32")):
        with pytest.raises(InputError, match=message):  # in the first batch
            Scoreboard(memory_of(), "test", [loader_of(2)]).update(answer([0], [0], [0]), targets)
    with pytest.raises(InputError, match=r"expected \(N, 3\)"):
        Scoreboard(memory_of("multilabel"), "test", [loader_of(2)]).update(answer([0], [0], [0]), torch.tensor([1]))
    board = Scoreboard(memory_of(), "test", [loader_of(9)])
    for _ in range(2):
        board.update(answer([0], [0], [0]), torch.tensor([0]))
    with pytest.raises(InputError, match=r"shape \(1, 2\), those of the batch before \(1,\)"):
        board.update(answer([0], [0], [0]), torch.tensor([[0, 1]]))
    board.update(answer([0], [0], [0]), torch.tensor([7]))
    with pytest.raises(InputError, match="targets holds 7"):
        evaluate(board, tmp_path)


def test_batches_wait_for_each_other(tmp_path, monkeypatch):
    """The first is counted at once, then as many together as there is room for; never more than that is kept."""
    monkeypatch.setattr(scoreboard, "_WAITING_ENTRIES", 4 * CLASSES)

    class Counts(Metric):
        updates: list[int] = []  # noqa: RUF012 - of all copies

        def update(self, predictions, targets):
            self.updates.append(len(targets))

        def compute(self):
            return torch.tensor(0.0)

    board = Scoreboard(memory_of(), "test", [loader_of(12)], metrics=Counts())
    for _ in range(6):
        board.update(answer([0, 1], [0, 1], [0, 1]), torch.tensor([0, 1]))
    assert Counts.updates[::3] == [2, 4, 4]
    (found,) = evaluate(board, tmp_path)
    assert Counts.updates[::3] == [2, 4, 4, 2]
    assert found.rows == 12


def test_own_metrics_that_are_no_number_are_left_out(tmp_path):
    board = Scoreboard(memory_of(), "test", [loader_of(2)], metrics={"matrix": MulticlassConfusionMatrix(CLASSES)})
    board.update(answer([0], [0], [0]), torch.tensor([0]))
    with pytest.warns(ResMemWarning, match="matrix_base, matrix_knn, matrix_resmem is left out"):
        (found,) = evaluate(board, tmp_path)
    assert not any("matrix" in name for name in found.scores)


def test_only_rank_zero_tells_of_them(tmp_path, recwarn):
    board = Scoreboard(memory_of(), "test", [loader_of(2)], metrics={"matrix": MulticlassConfusionMatrix(CLASSES)})
    board.update(answer([0], [0], [0]), torch.tensor([0]))
    ranks = Ranks(trainer(tmp_path))
    ranks.rank = 1
    board.evaluate(ranks)
    assert not [warning for warning in recwarn if issubclass(warning.category, ResMemWarning)]
    ranks.rank = 0
    with pytest.warns(ResMemWarning, match="matrix_base"):
        board.evaluate(ranks)
