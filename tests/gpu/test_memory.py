"""A memory on a GPU answers as it does on the CPU, without leaving the GPU."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_resmem import (
    DenseConfig,
    FaissIndex,
    Gate,
    GridTuner,
    LocalMemory,
    Multiclass,
    Multilabel,
    Regression,
    ResidualMemory,
    ResMemParams,
    Task,
    influence,
    label_errors,
    usefulness,
)
from lightning_resmem.memory.transfer import CPU, moved

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
WIDTH, OUTPUTS, ROWS, QUERIES = 24, 10, 3000, 70


def targets_of(task: Task, rows: int) -> Tensor:
    if isinstance(task, Multiclass):
        return torch.randint(0, OUTPUTS, (rows,))
    return torch.rand(rows, OUTPUTS).round() if isinstance(task, Multilabel) else torch.randn(rows, OUTPUTS)


def filled(task: Task | None = None, ids: Tensor | None = None, gate: Gate | None = None, **options) -> LocalMemory:
    task = task or Multiclass()
    params = ResMemParams(k=13, sigma=1.5, softmax_temperature=1.3, gate=gate)
    memory = LocalMemory(task, params, **({"index": "exact", "values": "dense"} | options))
    memory.add(torch.randn(ROWS, WIDTH), torch.randn(ROWS, OUTPUTS), targets_of(task, ROWS), ids)
    memory.build()
    return memory


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(QUERIES, WIDTH), torch.randn(QUERIES, OUTPUTS)


MEMORIES: dict[str, Callable[[], LocalMemory]] = {
    "dense": filled,
    "half values": lambda: filled(values=DenseConfig(torch.float16)),
    "sparse": lambda: filled(values="sparse"),
    "half keys": lambda: filled(key_dtype=torch.float16),
    "bfloat16 keys": lambda: filled(key_dtype=torch.bfloat16),
    "ids with gaps": lambda: filled(ids=torch.arange(ROWS) * 3),
    "ids far apart": lambda: filled(ids=torch.arange(ROWS) * 10**9),
    "gate": lambda: filled(gate=Gate(distance=-0.5, confidence=0.2)),
    "multilabel": lambda: filled(Multilabel()),
    "regression": lambda: filled(Regression()),
}


def check_same(memory: ResidualMemory, expected: LocalMemory, queries: Tensor, outputs: Tensor) -> None:
    """That two memories answer the same, on the device of the queries."""
    found, neighbors = memory.predictions_and_neighbors(queries, outputs)
    wanted, nearest = expected.predictions_and_neighbors(queries.cpu().float(), outputs.cpu().float())
    assert all(part.device == queries.device for part in (*found, *neighbors))
    assert torch.equal(neighbors.ids.cpu(), nearest.ids)
    torch.testing.assert_close(neighbors.distances.cpu(), nearest.distances, rtol=1e-5, atol=1e-5)
    for part, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(part.cpu(), right, rtol=1e-4, atol=1e-5)


@contextmanager
def waits() -> Iterator[list[str]]:
    """What the host waits for on a GPU."""
    seen: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
            seen += [f"{note.filename}:{note.lineno}" for note in caught if "synchronizing" in str(note.message)]
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("kind", MEMORIES)
def test_answers_are_those_of_the_cpu(kind: str) -> None:
    expected = MEMORIES[kind]()
    memory = copy.deepcopy(expected).to(GPU)
    queries, outputs = batch()
    check_same(memory, expected, queries.to(GPU), outputs.to(GPU))
    check_same(memory, expected, queries, outputs)


@pytest.mark.parametrize("kind", ["dense", "sparse", "ids far apart", "gate"])
def test_predictions_wait_once_beside_the_search(kind: str) -> None:
    memory, (queries, outputs) = MEMORIES[kind]().to(GPU), moved(GPU, *batch())
    memory.predictions(queries, outputs)
    with waits() as searching:
        memory.search(queries, memory.params.k)
    with waits() as predicting:
        memory.predictions(queries, outputs)
    assert len(searching) <= 1, searching
    assert len(predicting) <= 2, predicting  # it looks whether the outputs are finite, too


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        lambda: torch.autocast("cuda", dtype=torch.float16),
        lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        lambda: torch.cuda.stream(torch.cuda.Stream(GPU)),
    ],
    ids=["inference_mode", "autocast float16", "autocast bfloat16", "stream"],
)
def test_answers_do_not_depend_on_what_they_are_asked_in(around: Callable[[], object]) -> None:
    expected = filled()
    memory = copy.deepcopy(expected).to(GPU)
    queries, outputs = batch()
    with around():
        torch.cuda._sleep(20_000_000)  # the queries arrive late, on the caller's stream
        check_same(memory, expected, queries.to(GPU, non_blocking=True), outputs.to(GPU, non_blocking=True))
    assert torch.cuda.current_device() == GPU.index


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    expected, second = filled(), torch.device("cuda", 1)
    memory = copy.deepcopy(expected).to(second)
    for device in (second, GPU, CPU):
        check_same(memory, expected, *moved(device, *batch()))
    assert memory.device == second
    assert torch.cuda.current_device() == GPU.index


def test_half_precision_queries() -> None:
    expected = filled()
    memory, (queries, outputs) = copy.deepcopy(expected).to(GPU), batch()
    for dtype in (torch.float16, torch.bfloat16):
        check_same(memory, expected, queries.to(GPU, dtype), outputs.to(GPU, dtype))


def test_rows_come_go_and_change_on_a_gpu() -> None:
    expected = filled()
    memory = copy.deepcopy(expected).to(GPU)
    keys, outputs, labels = torch.randn(50, WIDTH), torch.randn(50, OUTPUTS), targets_of(memory.task, 50)
    for each, device in ((expected, CPU), (memory, GPU)):
        each.add(*moved(device, keys, outputs, labels))
        each.remove(torch.arange(100, 300, device=device))
        each.update(torch.tensor([1, 2], device=device), targets=torch.tensor([3, 3], device=device))
        each.params = dataclasses.replace(each.params, softmax_temperature=2.0)
    check_same(memory, expected, *moved(GPU, *batch()))


@pytest.mark.parametrize("kind", ["dense", "half values", "sparse", "half keys"])
def test_saved_on_one_device_and_loaded_on_the_other(kind: str, tmp_path: Path) -> None:
    expected = MEMORIES[kind]()
    copy.deepcopy(expected).to(GPU).save(tmp_path / "of-gpu")
    expected.save(tmp_path / "of-cpu")
    queries, outputs = batch()
    check_same(LocalMemory.load(tmp_path / "of-gpu"), expected, queries, outputs)
    loaded = LocalMemory.load(tmp_path / "of-cpu", device=GPU)
    assert loaded.device == GPU
    check_same(loaded, expected, queries.to(GPU), outputs.to(GPU))


def test_tuning_chooses_the_same() -> None:
    expected, (queries, outputs) = filled(), batch()
    labels = targets_of(expected.task, QUERIES)
    memory = copy.deepcopy(expected).to(GPU)
    found = GridTuner().tune(memory, *moved(GPU, queries, outputs, labels))
    wanted = GridTuner().tune(expected, queries, outputs, labels)
    assert found.params.k == wanted.params.k
    assert found.params.sigma == pytest.approx(wanted.params.sigma, rel=1e-4)
    assert found.score == pytest.approx(wanted.score)


def test_a_gate_and_choices_without_validation_rows() -> None:
    memory, (queries, outputs) = filled(), batch()
    labels = targets_of(memory.task, QUERIES)
    memory.remove(torch.arange(300, ROWS))  # of the CPU's seconds
    wanted = GridTuner().tune_leave_one_out(memory).params
    memory.to(GPU)
    found = GridTuner().tune_leave_one_out(memory).params
    assert (found.k, found.strength) == (wanted.k, wanted.strength)
    GridTuner(gate=True).tune(memory, *moved(GPU, queries, outputs, labels))


def test_explanations() -> None:
    memory, (queries, outputs) = filled(), batch()
    labels = targets_of(memory.task, QUERIES)
    wanted = influence(memory, 3, queries, outputs), usefulness(memory, queries, outputs, labels), label_errors(memory)
    memory.to(GPU)
    there = moved(GPU, queries, outputs, labels)
    found = influence(memory, 3, *there[:2]), usefulness(memory, *there), label_errors(memory)
    assert torch.equal(found[0].queries, wanted[0].queries)
    for ranking, right in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(ranking.scores, right.scores, rtol=1e-4, atol=1e-5)


def test_tensors_change_devices_together() -> None:
    tensors = torch.randn(3, 2), torch.arange(5), torch.tensor(True), torch.empty(0, 4), torch.randn(7).half()
    there = moved(GPU, *tensors)
    with waits() as seen:
        back = moved(CPU, *there)
    assert len(seen) <= 1, seen
    for part, wanted in zip(back, tensors, strict=True):
        assert torch.equal(part, wanted)


def test_faiss_on_a_gpu() -> None:
    faiss = pytest.importorskip("faiss", exc_type=Exception)
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("takes faiss-gpu")
    expected = filled()
    for factory in ("Flat", "IVF16,Flat"):
        memory = LocalMemory(
            params=expected.params, index=FaissIndex(factory, nprobe=None if factory == "Flat" else 16)
        )
        memory.to(GPU)
        memory.add_stored(expected.stored(slice(None)), OUTPUTS)
        check_same(memory, expected, *moved(GPU, *batch()))


@pytest.mark.usefixtures("ray_address")
def test_shards_with_parts_of_a_gpu() -> None:
    from lightning_resmem import RayMemory

    expected = filled()
    memory = RayMemory(2, params=expected.params, index="exact", gpus_per_shard=0.5, placement="PACK")
    try:
        rows = expected.fetch(expected.ids)
        memory.add(expected.stored(slice(None))["keys"], rows.outputs, rows.targets)
        memory.build()
        assert memory.stats()["device"].startswith("cuda")
        queries, outputs = batch()
        check_same(memory, expected, queries, outputs)
        check_same(memory, expected, queries.to(GPU), outputs.to(GPU))
    finally:
        memory.shutdown()
