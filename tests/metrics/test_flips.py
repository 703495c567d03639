"""Which rows flipped, on one rank or several: the first of either kind."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import LocalMemory, Multilabel, Neighbors, Predictions
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.tasks import TASKS
from tests.metrics.runs import answer, evaluate, loader_of, memory_of


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
        "token": None,
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
    assert found.gain == 4.0
    assert found.neighborhoods.counts.sum() == 2
