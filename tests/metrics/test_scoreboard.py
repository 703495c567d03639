"""Each row counted once, padding not at all, over batches and loaders; and which rows flipped."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from lightning_resmem import InputError, LocalMemory, Multilabel, Neighbors, Predictions, ResMemWarning
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.metrics import scoreboard
from lightning_resmem.metrics.scoreboard import Answer, Scoreboard
from lightning_resmem.tasks import TASKS
from tests.models import trainer

CLASSES = 3


def memory_of(task="multiclass"):
    memory = LocalMemory(TASKS[task]())
    targets = torch.zeros(2, dtype=torch.int64) if task == "multiclass" else torch.zeros(2, CLASSES)
    memory.add(torch.eye(2), torch.zeros(2, CLASSES), targets)
    memory.build()
    return memory


def answer(base, knn, resmem, near=2):
    """Certain predictions of these labels; the neighbours of row i are `10 * i` and `10 * i + 1`, ..."""
    base, knn, resmem = (torch.eye(CLASSES)[list(labels)] for labels in (base, knn, resmem))
    ids = 10 * torch.arange(len(base))[:, None] + torch.arange(near)
    return Answer(10 * base, Predictions(base, knn, resmem), Neighbors(ids / 4, ids))


def loader_of(rows, ranks=1, rank=0, **options):
    data = TensorDataset(torch.arange(rows))
    sampler = None if ranks == 1 else DistributedSampler(data, ranks, rank, shuffle=options.pop("shuffled", False))
    return DataLoader(data, batch_size=2, sampler=sampler, **options)


def evaluate(board, root):
    board.finish()
    return board.evaluate(Ranks(trainer(root)))


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
    assert set(found.reliability) == {"base", "knn", "resmem"}
    assert found.reliability["resmem"].counts.sum() == found.neighborhoods.counts.sum() == 4


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


@pytest.mark.parametrize(
    ("loader", "positions"),
    [
        (loader_of(6), [1, 3]),
        (loader_of(12, ranks=2, rank=1), [3, 7]),
        (loader_of(12, ranks=2, rank=1, shuffled=True), [None, None]),
        (DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True), [None, None]),
    ],
    ids=["one rank", "second of two ranks", "shuffled ranks", "shuffled"],
)
def test_flips_of_classes(loader, positions, tmp_path):
    board = Scoreboard(memory_of(), "test", [loader])
    board.update(answer([0, 0, 2], [0, 0, 0], [0, 1, 2], near=9), torch.tensor([0, 1, 2]))  # row 1 is turned right
    board.update(answer([1, 1, 0], [0, 0, 0], [0, 1, 1], near=9), torch.tensor([1, 0, 2]))  # row 3 wrong; 5 stays so
    (found,) = evaluate(board, tmp_path)
    right, wrong = sorted(found.flips, key=lambda flip: -flip.is_positive)
    assert [right.position, wrong.position] == positions
    assert dataclasses.asdict(right) | {"base_confidence": 1.0, "resmem_confidence": 1.0, "position": None} == {
        "position": None,
        "target": 1,
        "base": 0,
        "resmem": 1,
        "base_confidence": 1.0,
        "resmem_confidence": 1.0,
        "neighbor_ids": (10, 11, 12, 13, 14),
        "neighbor_distances": (2.5, 2.75, 3.0, 3.25, 3.5),
        "output": None,
    }
    alone = torch.tensor([10.0, 0, 0]).softmax(dim=0)[0].item()
    assert right.base_confidence == pytest.approx(alone)
    assert right.resmem_confidence == pytest.approx(1 / 1.1)  # 0.1 of the base's certainty stays with its label
    assert (wrong.target, wrong.base, wrong.resmem, wrong.is_positive) == (1, 1, 0, False)


def test_flips_of_labels(tmp_path):
    base = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.2, 0.2]])
    resmem = torch.tensor([[0.3, 0.1, 1.2], [0.2, 0.2, 0.2]])
    given = Answer(base.logit(), Predictions(base, base, resmem), Neighbors(torch.ones(2, 1), torch.ones(2, 1).long()))
    board = Scoreboard(memory_of("multilabel"), "test", [loader_of(2)])
    board.update(given, torch.tensor([[1, 0, 1], [0, 0, 0]]))
    (found,) = evaluate(board, tmp_path)
    assert [(flip.position, flip.output, flip.target, flip.base, flip.resmem) for flip in found.flips] == [
        (0, 2, 1, 0, 1),
        (0, 0, 1, 1, 0),
    ]
    positive, negative = found.flips
    assert positive.base_confidence == pytest.approx(0.6)
    assert positive.resmem_confidence == pytest.approx(1 - Multilabel.margin)
    assert negative.base_confidence == pytest.approx(0.9)
    assert negative.resmem_confidence == pytest.approx(0.7)
    assert found.scores["positive_flip_rate"] == found.scores["negative_flip_rate"] == pytest.approx(1 / 6)


def test_only_the_first_flips_are_kept(tmp_path):
    board = Scoreboard(memory_of(), "test", [loader_of(400)])
    for _ in range(40):  # five right, five wrong
        board.update(answer([0, 1] * 5, [0] * 10, [1, 0] * 5), torch.tensor([1, 1] * 5))
    (found,) = evaluate(board, tmp_path)
    assert [flip.position for flip in found.flips] == list(range(200))
    assert sum(flip.is_positive for flip in found.flips) == 100
    assert found.scores["positive_flip_rate"] == found.scores["negative_flip_rate"] == 0.5


def test_regression_has_no_flips(tmp_path):
    memory = LocalMemory(TASKS["regression"]())
    memory.add(torch.eye(2), torch.zeros(2, 1), torch.zeros(2, 1))
    board = Scoreboard(memory, "test", [loader_of(2)])
    zeros, near = torch.zeros(2, 1), Neighbors(torch.ones(2, 1), torch.ones(2, 1).long())
    board.update(
        Answer(zeros, Predictions(zeros, zeros + 1, zeros + 2), near), torch.tensor([2.0, 2.0])
    )  # flat targets
    (found,) = evaluate(board, tmp_path)
    assert [found.scores[f"mse_{name}"] for name in Predictions._fields] == [4.0, 1.0, 0.0]
    assert found.flips == ()
    assert found.reliability == {}
    assert found.gain == -4.0
    assert found.neighborhoods.counts.sum() == 2
