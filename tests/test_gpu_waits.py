"""How often the host waits for a GPU on the way from a batch to predictions, scores and tuned params.

A number that is read, a shape that depends on numbers, or a copy to the host makes a GPU finish all that it was asked,
which costs more than most of what is asked. `simulated_gpu` notes each of them, without a GPU.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_resmem import (
    DenseConfig,
    Gate,
    LocalMemory,
    Multiclass,
    Multilabel,
    Regression,
    ResMemModule,
    ResMemParams,
    Task,
)
from lightning_resmem.memory.search.exact import ExactIndex
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.sequences import RowReader
from lightning_resmem.routing import Routing
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Sweep
from tests.simulated_gpu import DEVICE, SimulatedGpu, simulated_gpu

WIDTH, OUTPUTS, ROWS, BATCH = 8, 6, 200, 16
PARAMS = ResMemParams(k=5, sigma=1.0)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    """A simulated GPU on which the search itself, which has tests of its own, is not listened to."""
    search = ExactIndex.search
    with simulated_gpu() as gpu:

        def unheard(index: ExactIndex, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
            with gpu.ignoring():
                return search(index, queries, k)

        monkeypatch.setattr(ExactIndex, "search", unheard)
        yield gpu


def targets_of(task: Task, rows: int) -> Tensor:
    if isinstance(task, Multiclass):
        return torch.randint(0, OUTPUTS, (rows,))
    return torch.rand(rows, OUTPUTS).round() if isinstance(task, Multilabel) else torch.randn(rows, OUTPUTS)


def filled(task: Task, values: str | DenseConfig = "dense", ids: Tensor | None = None, **params: object) -> LocalMemory:
    memory = LocalMemory(task, ResMemParams(k=5, sigma=1.0, **params), index="exact", values=values)
    memory.add(torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUTPUTS), targets_of(task, ROWS), ids)
    memory.build()
    return memory


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICE) for tensor in tensors)


MEMORIES = {
    "dense": lambda: filled(Multiclass()),
    "half": lambda: filled(Multiclass(), DenseConfig(torch.float16)),
    "sparse": lambda: filled(Multiclass(), "sparse"),
    "gate": lambda: filled(Multiclass(), gate=Gate(distance=-1.0, confidence=0.5), softmax_temperature=2.0),
    "ids with gaps": lambda: filled(Multiclass(), ids=3 * torch.arange(ROWS)),
    "ids far apart": lambda: filled(Multiclass(), ids=10**9 * torch.arange(ROWS)),
    "multilabel": lambda: filled(Multilabel()),
    "regression": lambda: filled(Regression()),
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_predictions_wait_once_to_see_that_a_batch_is_finite(kind: str, gpu: SimulatedGpu) -> None:
    memory = MEMORIES[kind]()
    queries, outputs = torch.randn(BATCH, WIDTH), torch.randn(BATCH, OUTPUTS)
    expected = memory.predictions(queries, outputs)
    memory.to(DEVICE)
    memory.predictions(*on_gpu(queries, outputs))  # tables are derived at the first
    moved = on_gpu(queries, outputs)
    gpu.waits.clear()
    found = memory.predictions(*moved)
    routed = Answer.of(memory, *moved).combined(memory.task)
    assert [wait.split(" at ")[0] for wait in gpu.waits] == ["a number is read"] * 2, gpu.waits  # once each
    assert all(part.device == DEVICE for part in (*found, routed))
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part.cpu(), wanted)


def test_a_memory_on_a_gpu_answers_queries_of_the_cpu_with_one_copy_either_way(gpu: SimulatedGpu) -> None:
    memory = MEMORIES["dense"]()
    queries = torch.randn(BATCH, WIDTH)
    expected = memory.search(queries, 3), memory(queries)
    memory.to(DEVICE)
    memory(queries)
    gpu.waits.clear()
    neighbors = memory.search(queries, 3)
    assert [wait.split(" at ")[0] for wait in gpu.waits] == ["copy to the GPU", "copy from the GPU"], gpu.waits
    gpu.waits.clear()
    sums = memory.sums(memory.search(queries, 5))[0]
    assert len(gpu.waits) == 4, gpu.waits
    for part, wanted in zip((*neighbors, sums), (*expected[0], expected[1]), strict=True):
        torch.testing.assert_close(part, wanted)


def test_scores_wait_a_few_times_for_many_batches(gpu: SimulatedGpu) -> None:
    memory = MEMORIES["dense"]()
    board = Scoreboard(memory, "test", [[]], "cpu")
    batches = [
        (torch.randn(BATCH, WIDTH), torch.randn(BATCH, OUTPUTS), targets_of(memory.task, BATCH)) for _ in range(6)
    ]
    for queries, outputs, targets in batches:
        board.update(Answer.of(memory, queries, outputs), targets)
    board.finish()
    memory.to(DEVICE)
    on_board = Scoreboard(memory, "test", [[]], DEVICE)
    answers = [
        (Answer.of(memory, *on_gpu(queries, outputs)), targets.to(DEVICE)) for queries, outputs, targets in batches
    ]
    gpu.waits.clear()
    on_board.update(*answers[0])
    at_first = len(gpu.waits)
    assert at_first <= 7, gpu.waits
    for answer, targets in answers[1:]:
        on_board.update(answer, targets)
    assert len(gpu.waits) == at_first, gpu.waits
    on_board.finish()
    assert len(gpu.waits) <= 2 * at_first, gpu.waits
    scores, expected = (b._parts[0]._metrics.compute() for b in (on_board, board))
    for name, score in scores.items():
        torch.testing.assert_close(score.cpu(), expected[name], msg=name)
    flips, wanted = ([flip for kind in b._parts[0]._flips.found for flip in kind] for b in (on_board, board))
    assert flips
    for flip, other in zip(flips, wanted, strict=True):
        found, whole = dataclasses.asdict(flip), dataclasses.asdict(other)
        for name in ("base_confidence", "resmem_confidence", "neighbor_distances"):
            assert found.pop(name) == pytest.approx(whole.pop(name), rel=1e-5)
        assert found == whole


@pytest.mark.parametrize("task", [Multiclass(), Regression()], ids=["multiclass", "regression"])
def test_tuning_waits_as_often_for_many_settings_as_for_few(task: Task, gpu: SimulatedGpu) -> None:
    memory = filled(task)
    rows = Rows(torch.randn(BATCH, WIDTH), torch.randn(BATCH, OUTPUTS), targets_of(task, BATCH), None)
    settings = [
        ResMemParams(k, sigma, temperature, strength)
        for k in (1, 5)
        for sigma in (0.5, 2.0)
        for temperature in (1.0, 3.0)
        for strength in (0.0, 0.5, 1.0)
    ]
    expected = Sweep(memory, rows, [1, 5], lambda own: own).measure(settings)
    memory.to(DEVICE)
    sweep = Sweep(memory, Rows(*on_gpu(*rows[:3]), None), [1, 5], lambda own: own)
    sweep.measure(settings)
    gpu.waits.clear()
    found = sweep.measure(settings)
    assert len(gpu.waits) == 1, gpu.waits
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-6)


def test_a_module_is_where_its_base_is(gpu: SimulatedGpu) -> None:
    net = Net().eval()
    memory = LocalMemory(params=PARAMS, index="exact")
    rows = torch.randn(ROWS, WIDTH)
    with torch.no_grad():
        keys = torch.tanh(net.body(rows))
        memory.add(keys, net.head(keys), targets_of(memory.task, ROWS))
    module = ResMemModule(net, memory, head="head")
    batch = torch.randn(3, WIDTH), torch.tensor([0, 1, 2])
    expected = module.explain(batch)
    for place in (nn.ModuleList([net]), module):  # the base alone, as no hook of Lightning's sees; then both
        place.to(DEVICE)
        assert module.device == DEVICE
        found = module.explain(batch)
        assert [row["id"] for row in found.rows] == [row["id"] for row in expected.rows]
        torch.testing.assert_close(found.predictions.resmem, expected.predictions.resmem)
    gpu.waits.clear()
    module.predictions(on_gpu(*batch))
    assert [wait for wait in gpu.waits if wait.startswith("a number")] == gpu.waits[-1:], gpu.waits
    assert memory.device == DEVICE
    module.to("cpu")
    assert module.device == torch.device("cpu")


def test_a_routed_step_waits_once(gpu: SimulatedGpu, tmp_path: Path) -> None:
    net, memory = Net().eval(), MEMORIES["dense"]()
    memory.provenance["head"] = "head"
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.state.fn = TrainerFn.TESTING
    inputs = torch.randn(BATCH, WIDTH)
    net.to(DEVICE)
    memory.to(DEVICE)
    routing = Routing(trainer, net, memory, BatchReader(), replace=True, prefix=None)
    try:
        for batch in inputs.to(DEVICE), -inputs.to(DEVICE):
            gpu.waits.clear()
            routing.start_batch((batch, None))
            with torch.no_grad():
                routed = net(batch)
            routing.end_batch((batch, None), 0)
    finally:
        routing.close()
    assert len(gpu.waits) == 1, gpu.waits  # of the second batch: with the first the weights are looked at
    with torch.no_grad():
        embedding = torch.tanh(net.body(batch))
        expected = Answer.of(memory, embedding, net.head(embedding)).combined(memory.task)
    assert torch.equal(routed.cpu(), expected.cpu())


@pytest.mark.parametrize("own_labels", [False, True], ids=["the inputs are the labels", "labels of their own"])
def test_targets_of_sequences_wait_once_a_batch(own_labels: bool, gpu: SimulatedGpu) -> None:
    tokens = torch.randint(0, OUTPUTS, (4, 7))
    mask = torch.arange(7).expand(4, 7) < torch.tensor([7, 5, 3, 1])[:, None]
    labels = ((tokens + own_labels) % OUTPUTS).masked_fill(~mask, -100)
    batch = {"input_ids": tokens, "labels": labels, "attention_mask": mask.long()}
    expected = RowReader(BatchReader(), Net(), Multiclass()).targets(batch, (4, 7, OUTPUTS))
    there = {name: part.to(DEVICE) for name, part in batch.items()}
    reader = RowReader(BatchReader(), Net(), Multiclass())
    for _ in range(2):
        gpu.waits.clear()
        found = reader.targets(there, (4, 7, OUTPUTS))
        assert len(gpu.waits) <= 1, gpu.waits
    assert reader.describe() == {"shift": str(int(not own_labels))}
    for part, wanted in zip(found, expected, strict=True):
        assert torch.equal(part.cpu(), wanted)
