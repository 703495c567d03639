"""Base, knn and resmem side by side: each row counted once, padding not at all, over batches, loaders and ranks."""

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_resmem.errors import InputError
from lightning_resmem.memory.base import Predictions
from lightning_resmem.metrics import Scoreboard
from lightning_resmem.tasks import TASKS, Multiclass, Multilabel, Regression


def predicted(*labels, classes=3):
    return torch.eye(classes)[list(labels)]


def predictions(base, knn, resmem):
    return Predictions(predicted(*base), predicted(*knn), predicted(*resmem))


def test_accuracy_over_batches_of_different_sizes():
    board = Scoreboard(Multiclass(), "test")
    board.update(predictions([0, 1, 2], [0, 1, 1], [0, 1, 0]), torch.tensor([0, 1, 0]))
    board.update(predictions([2], [0], [2]), torch.tensor([2]))
    found = board.compute()
    assert found == pytest.approx({"test/acc_base": 3 / 4, "test/acc_knn": 2 / 4, "test/acc_resmem": 1.0})
    assert list(found) == ["test/acc_base", "test/acc_knn", "test/acc_resmem"]
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_the_mean_of_the_tasks_scores(task):
    task = TASKS[task]()
    generator = torch.Generator().manual_seed(0)
    found = Predictions(*(torch.rand(11, 3, generator=generator) for _ in range(3)))
    targets = torch.randint(0, 2, (11,) if task.name == "multiclass" else (11, 3), generator=generator)
    targets = targets.float() if task.name == "regression" else targets
    board = Scoreboard(task, "val")
    for start in range(0, 11, 4):
        rows = slice(start, start + 4)
        board.update(Predictions(*(prediction[rows] for prediction in found)), targets[rows])
    expected = {
        f"val/{task.score_name}_{name}": task.score(prediction, targets).mean().item()
        for name, prediction in found._asdict().items()
    }
    assert len(set(expected.values())) == 3
    assert board.compute() == pytest.approx(expected)


def test_names_of_a_regression():
    board = Scoreboard(Regression(), "test")
    zeros = torch.zeros(2, 1)
    board.update(Predictions(zeros, zeros + 1, zeros + 2), torch.tensor([2.0, 2.0]))  # flat targets are understood
    assert board.compute() == {"test/mse_base": 4.0, "test/mse_knn": 1.0, "test/mse_resmem": 0.0}


@pytest.mark.parametrize("batch_sizes", [(1,) * 6, (2, 2, 2), (4, 2), (6,)])
@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 6, 9])
def test_padding_is_not_counted(batch_sizes, num_rows):
    """All true rows are right and all padded rows wrong."""
    targets = torch.zeros(6, dtype=torch.int64)
    right = [0 if row < num_rows else 1 for row in range(6)]
    board, start = Scoreboard(Multiclass(), "test"), 0
    for size in batch_sizes:
        rows = slice(start, start + size)
        board.update(predictions(right[rows], right[rows], right[rows]), targets[rows], num_rows=num_rows)
        start += size
    assert set(board.compute().values()) == {1.0}
    counts = {int(metric.weight) for metric in board._metrics[0].values()}
    assert counts == {min(num_rows, 6)}


def test_dataloaders_are_kept_apart():
    board = Scoreboard(Multiclass(), "test", num_dataloaders=2)
    for labels in ([0], [1]):
        board.update(predictions(labels, labels, labels), torch.tensor([0]), dataloader_idx=0)
    board.update(predictions([1, 2], [1, 2], [1, 2]), torch.tensor([1, 2]), dataloader_idx=1, num_rows=1)
    found = board.compute()
    assert len(found) == 6
    assert found["test/acc_base/dataloader_idx_0"] == 0.5
    assert found["test/acc_resmem/dataloader_idx_1"] == 1.0
    with pytest.raises(IndexError):
        board.update(predictions([0], [0], [0]), torch.tensor([0]), dataloader_idx=2)


def test_targets_are_checked():
    board = Scoreboard(Multiclass(), "test")
    with pytest.raises(InputError, match="targets holds 3"):
        board.update(predictions([0], [0], [0]), torch.tensor([3]))
    with pytest.raises(InputError, match=r"dtype torch.float32"):
        board.update(predictions([0], [0], [0]), torch.tensor([1.0]))
    with pytest.raises(InputError, match=r"expected \(N, 3\)"):
        Scoreboard(Multilabel(), "test").update(predictions([0], [0], [0]), torch.tensor([1]))


def test_two_boards_share_nothing():
    one, other = Scoreboard(Multiclass(), "test"), Scoreboard(Multiclass(), "test")
    one.update(predictions([0], [0], [0]), torch.tensor([0]))
    other.update(predictions([0], [0], [0]), torch.tensor([1]))
    assert set(one.compute().values()) == {1.0}
    assert set(other.compute().values()) == {0.0}


def on_rank(rank, port, results):
    """Rank 0 has three rows, rank 1 none but padding."""
    torch.set_num_threads(1)  # the threads of the parent did not survive the fork
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        board = Scoreboard(Multiclass(), "test")
        if rank == 0:
            board.update(predictions([0, 1, 2], [0, 0, 0], [0, 1, 0]), torch.tensor([0, 1, 2]))
        else:
            board.update(predictions([1], [1], [1]), torch.tensor([0]), num_rows=0)
        results.put((rank, board.compute()))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_are_summed_also_one_without_rows():
    context = multiprocessing.get_context("fork")  # spawn would import everything twice
    results = context.Queue()
    probe = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    port = probe.port
    del probe
    processes = [context.Process(target=on_rank, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=90) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()
    assert found[0] == found[1]
    assert found[0] == pytest.approx({"test/acc_base": 1.0, "test/acc_knn": 1 / 3, "test/acc_resmem": 2 / 3})
