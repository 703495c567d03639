"""Threads that use a memory at once get the answers of one thread, also while another changes the memory."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_resmem import LocalMemory, ResMemParams, explain
from lightning_resmem.memory.search import exact
from lightning_resmem.memory.search.faiss_index import FaissIndex
from tests.threads import at_once

ROWS, WIDTH, CLASSES = 3000, 8, 5
PARAMS = ResMemParams(k=10, sigma=0.7, softmax_temperature=1.2)


def _rows(count: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.randn(count, WIDTH),
        torch.randn(count, CLASSES),
        torch.randint(CLASSES, (count,)),
        torch.randperm(9 * count)[:count],
    )


def _filled(rows: tuple[Tensor, ...], index: object = "exact", values: str = "dense") -> LocalMemory:
    memory = LocalMemory(params=PARAMS, index=index, values=values)
    for chunk in zip(*(part.split(500) for part in rows), strict=True):
        memory.add(*chunk)
    return memory


@pytest.mark.parametrize(
    ("index", "values"), [("exact", "dense"), ("exact", "sparse"), (FaissIndex("IVF4,Flat", nprobe=4), "dense")]
)
def test_the_first_searches_of_a_memory_that_is_not_built(index: object, values: str) -> None:
    rows, queries, outputs = _rows(), torch.randn(8, 6, WIDTH), torch.randn(8, 6, CLASSES)
    serial = _filled(rows, index, values)
    wanted = [serial.predict(queries[number], outputs[number]) for number in range(8)]
    for _ in range(10):
        memory = _filled(rows, index, values)
        found = at_once(8, lambda number: memory.predict(queries[number], outputs[number]))  # noqa: B023
        for prediction, serially in zip(found, wanted, strict=True):
            torch.testing.assert_close(prediction, serially, rtol=0, atol=1e-6)


def test_what_is_derived_at_the_first_search_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    derived, passes = [], []
    residuals, norms = type(_filled(_rows()).task).residuals, exact.rough.squared_norms
    monkeypatch.setattr(
        "lightning_resmem.tasks.Multiclass.residuals", lambda *given: [derived.append(1), residuals(*given)][1]
    )
    monkeypatch.setattr(
        exact.rough, "squared_norms", lambda *given, **options: [passes.append(1), norms(*given, **options)][1]
    )
    memory = _filled(_rows())
    queries, outputs = torch.randn(6, WIDTH), torch.randn(6, CLASSES)
    at_once(8, lambda _: memory.predict(queries, outputs))
    assert len(derived) == 1
    assert len(passes) <= 2  # one for each of two ways to search


def test_each_answers_with_its_own_temperature() -> None:
    memory = _filled(_rows())
    memory.build()
    ids, weights = memory.ids[torch.randint(ROWS, (6, 10))], torch.rand(6, 10)
    temperatures = [0.5, 1.0, 2.0, 4.0]
    wanted = [memory.weighted_sums(ids, weights, temperature)[0] for temperature in temperatures]

    def work(number: int) -> list[Tensor]:
        return [memory.weighted_sums(ids, weights, temperatures[number % 4])[0] for _ in range(10)]

    for number, found in enumerate(at_once(8, work)):
        assert all(torch.equal(sums, wanted[number % 4]) for sums in found)


def _edits(memory: LocalMemory, rows: tuple[Tensor, ...]) -> dict[str, tuple[Callable[[], None], Callable[[], None]]]:
    """Changes of a memory, and how they are undone."""
    embeddings, outputs, targets, ids = (part[:700] for part in rows)
    return {
        "remove": (lambda: memory.remove(ids), lambda: memory.add(embeddings, outputs, targets, ids)),
        "update": (
            lambda: memory.update(ids, -embeddings, outputs.flip(1), (targets + 1) % CLASSES),
            lambda: memory.update(ids, embeddings, outputs, targets),
        ),
        "params": (
            lambda: setattr(memory, "params", ResMemParams(k=3, sigma=0.1, strength=0.5)),
            lambda: setattr(memory, "params", PARAMS),
        ),
        "filled": (
            lambda: [memory.clear(), memory.add(embeddings, outputs, targets, ids)],
            lambda: [memory.clear(), memory.add(*rows)],
        ),
    }


@pytest.mark.parametrize("edit", ["remove", "update", "params", "filled"])
def test_each_answer_is_that_of_before_or_after_a_change(edit: str) -> None:
    rows = _rows()
    memory, queries, outputs = _filled(rows), torch.randn(6, WIDTH), torch.randn(6, CLASSES)
    change, undo = _edits(memory, rows)[edit]

    def ask() -> tuple[Tensor, ...]:
        try:
            found = explain(memory, queries, outputs, top=3)
        except Exception as error:
            if edit == "filled" and "empty" in str(error):  # between the two calls
                return ()
            raise
        return *found.predictions, found.neighbors.ids, found.contributions.sum(1) + found.rest

    before = ask()
    change()
    after = ask()
    undo()
    ended = threading.Event()

    answers: list[tuple[Tensor, ...]] = []

    def work(number: int) -> None:
        while number and not ended.is_set():
            answers.append(ask())
        try:
            while not number and len(answers) < 60:
                change()
                undo()
        finally:
            ended.set()

    def alike(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
        return all(
            part.shape == same.shape and torch.allclose(part, same, atol=1e-5)
            for part, same in zip(one, other, strict=True)
        )

    at_once(9, work)
    assert not [1 for answer in answers if answer and not alike(answer, before) and not alike(answer, after)]
    assert alike(ask(), before)


def test_answers_that_belong_together() -> None:
    memory, queries = _filled(_rows()), torch.randn(6, WIDTH)
    memory.build()
    reading, removed = threading.Event(), threading.Event()

    def work(number: int) -> bool:
        if number:
            reading.wait()
            memory.remove(memory.ids[:100])
            removed.set()
            return True
        with memory.reading():
            reading.set()
            neighbors = memory.search(queries, 5)
            removed.wait(0.2)
            return not removed.is_set() and len(memory.fetch(neighbors.ids.flatten())) == 30

    assert at_once(2, work) == [True, True]
    assert len(memory) == ROWS - 100


def test_ids_that_were_asked_for_stay_as_they_were() -> None:
    memory = _filled(_rows(20))
    ids = memory.ids
    wanted = ids.clone()
    memory.remove(ids[:7].clone())
    assert torch.equal(ids, wanted)


def test_a_user_precision_of_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        memory, queries = _filled(_rows()), torch.randn(6, WIDTH)
        at_once(8, lambda _: [memory.search(queries, 3) for _ in range(20)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
