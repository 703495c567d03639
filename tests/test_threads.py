"""Threads that share one ResMemModule, or one ResMemPredictor, get the answers of one thread."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lightning_resmem import LocalMemory, ResMemModule, ResMemPredictor, StaleMemoryError, memorize
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.modes import evaluation_mode
from tests.models import CallsSelf, NoForward, NormAndDropout, data_for, hooks_on, make, memory_for, trainer
from tests.threads import at_once

THREADS, CALLS = 8, 15
KINDS = [CallsSelf, NormAndDropout, NoForward]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def _combined(kind, root, **options):
    return memorize(trainer(root), make(kind), data_for(kind), memory=memory_for(kind), **options)


def _batches(kind):
    inputs, targets = data_for(kind).test
    return [(inputs[first : first + 5], targets[first : first + 5]) for first in range(0, 5 * THREADS, 5)]


@pytest.mark.parametrize("training", [False, True])
def test_threads_that_share_a_module(kind, training, tmp_path):
    resmem, batches = _combined(kind, tmp_path), _batches(kind)
    wanted = [resmem.predictions(batch).resmem for batch in batches]
    resmem.train(training)

    def work(number):
        return [resmem.predictions(batches[number]).resmem for _ in range(CALLS)]

    for number, answers in enumerate(at_once(THREADS, work)):
        for answer in answers:
            torch.testing.assert_close(answer, wanted[number])
    assert all(module.training is training for module in resmem.base.modules())
    assert not hooks_on(resmem.base)


def test_threads_that_find_the_head_and_read_channels(tmp_path):
    resmem = _combined(CallsSelf, tmp_path)
    batches = _batches(CallsSelf)
    wanted = [resmem(inputs) for inputs, _ in batches]
    memory = resmem.memory
    del memory.provenance["head"]
    for _ in range(5):
        fresh = ResMemModule(resmem.base, memory)
        for number, answer in enumerate(at_once(THREADS, lambda number: fresh(batches[number][0]))):  # noqa: B023
            torch.testing.assert_close(answer, wanted[number])


def test_threads_that_share_a_predictor(tmp_path):
    resmem, batches = _combined(CallsSelf, tmp_path), _batches(CallsSelf)
    predictor = ResMemPredictor(lambda: resmem.memory, resmem.base, inputs="x")
    columns = [{"x": inputs.numpy()} for inputs, _ in batches]
    wanted = [predictor(batch) for batch in columns]

    def work(number):
        return [predictor(columns[number]) for _ in range(CALLS)]

    for number, answers in enumerate(at_once(THREADS, work)):
        for answer in answers:
            for name in ("base", "resmem"):
                np.testing.assert_allclose(answer[name], wanted[number][name], atol=1e-6)


def test_threads_that_explain(tmp_path):
    resmem, batches = _combined(CallsSelf, tmp_path), _batches(CallsSelf)
    wanted = [resmem.explain(batch) for batch in batches]
    found = at_once(THREADS, lambda number: resmem.explain(batches[number]))
    for explanation, serially in zip(found, wanted, strict=True):
        torch.testing.assert_close(explanation.contributions, serially.contributions)
        assert torch.equal(explanation.neighbors.ids, serially.neighbors.ids)


def test_a_module_while_another_thread_edits_its_memory(tmp_path):
    resmem, (inputs, _) = _combined(CallsSelf, tmp_path), _batches(CallsSelf)[0]
    memory, ids, ended, answers = resmem.memory, resmem.memory.ids[::2].clone(), threading.Event(), []
    rows = memory.stored(memory.places(ids))
    before = resmem(inputs)
    memory.remove(ids)
    after = resmem(inputs)
    memory.add_stored(rows, memory.num_outputs)
    assert not torch.allclose(before, after)

    def work(number):
        while number and not ended.is_set():
            answers.append(resmem(inputs))
        try:
            while not number and len(answers) < 100:
                memory.remove(ids)
                memory.add_stored(rows, memory.num_outputs)
        finally:
            ended.set()

    at_once(THREADS, work)
    assert all(torch.allclose(answer, before) or torch.allclose(answer, after) for answer in answers)


def test_what_a_tap_captures_belongs_to_its_thread():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    tap, inputs = HeadTap(model, "2", "0"), torch.randn(THREADS, 2, 1, 5, 5)
    wanted = [(model[0](x).mean(dim=(2, 3)), model(x)) for x in inputs]

    def work(number):
        with tap.capture():
            captured = []
            for _ in range(CALLS):
                tap.clear()
                model(inputs[number])
                captured.append(tap.take())
        return captured

    for number, calls in enumerate(at_once(THREADS, work)):
        for captured in calls:
            torch.testing.assert_close(captured.embedding, wanted[number][0])
            torch.testing.assert_close(captured.output, wanted[number][1])
    assert not hooks_on(model)


def test_the_mode_is_put_back_by_the_last_thread():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    first, last = threading.Event(), threading.Event()

    def work(number):
        if number:
            with evaluation_mode(model):
                first.set()
                last.wait()
                return model[0].training
        first.wait()
        with evaluation_mode(model):
            pass
        last.set()
        return False

    assert at_once(2, work) == [False, False]
    assert model[0].training


def test_a_memory_that_another_model_has_filled_again(tmp_path):
    memory = LocalMemory()
    first = memorize(trainer(tmp_path), make(CallsSelf), data_for(CallsSelf), memory=memory)
    inputs, _ = _batches(CallsSelf)[0]
    first(inputs)
    predictor = ResMemPredictor(lambda: memory, first.base, inputs="x")
    other = make(CallsSelf)
    _shake(other)
    second = memorize(trainer(tmp_path), other, data_for(CallsSelf), memory=memory)
    second(inputs)
    for ask in (
        lambda: first(inputs),
        lambda: first.predictions(_batches(CallsSelf)[0]),
        lambda: first.explain(_batches(CallsSelf)[0]),
        lambda: predictor({"x": inputs.numpy()}),
    ):
        with pytest.raises(StaleMemoryError, match="the memory was filled with weights"):
            ask()


def _shake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


def test_a_memory_that_was_cleared_and_filled_by_hand(tmp_path):
    resmem, (inputs, _) = _combined(CallsSelf, tmp_path), _batches(CallsSelf)[0]
    memory = resmem.memory
    rows, width, head = memory.stored(memory.places(memory.ids)), memory.num_outputs, memory.provenance["head"]
    memory.clear()
    memory.add_stored(rows, width)
    with pytest.raises(StaleMemoryError, match="was cleared since"):
        resmem(inputs)
    assert len(ResMemModule(resmem.base, memory, head=head)(inputs)) == 5


def test_edits_do_not_make_a_memory_stale(tmp_path):
    resmem, (inputs, _) = _combined(CallsSelf, tmp_path), _batches(CallsSelf)[0]
    before = resmem(inputs)
    resmem.memory.remove(resmem.memory.ids[:40].clone())
    assert not torch.equal(resmem(inputs), before)


def _statistics(base):
    norm = next(module for module in base.modules() if isinstance(module, nn.BatchNorm1d))
    norm.train()(torch.randn(50, norm.num_features) * 3)


def _replaced_buffers(base):
    state = {name: value.clone() for name, value in base.state_dict().items()}
    name = next(name for name in state if name.endswith("running_mean"))
    state[name] += 1
    base.load_state_dict(state, assign=True)


def _replaced_parameters(base):
    base.load_state_dict({name: value + 1 for name, value in base.state_dict().items()}, assign=True)


def _assigned_data(base):
    parameter = next(base.parameters())
    parameter.data = parameter.data + 1


def _assigned_buffer(base):
    norm = next(module for module in base.modules() if isinstance(module, nn.BatchNorm1d))
    norm.running_var = norm.running_var * 4


@pytest.mark.parametrize(
    "change", [_shake, _statistics, _replaced_buffers, _replaced_parameters, _assigned_data, _assigned_buffer]
)
def test_a_base_that_was_changed_elsewhere(change, tmp_path):
    resmem, batch = _combined(NormAndDropout, tmp_path), _batches(NormAndDropout)[0]
    resmem.predictions(batch)
    predictor = ResMemPredictor(lambda: resmem.memory, resmem.base, inputs="x")
    change(resmem.base)
    for ask in (
        lambda: resmem.predictions(batch),
        lambda: resmem.explain(batch),
        lambda: predictor({"x": batch[0].numpy()}),
    ):
        for _ in range(2):
            with pytest.raises(StaleMemoryError, match="Different are"):
                ask()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_of_a_module_answers_and_watches_for_itself(copied, tmp_path):
    resmem, batch = _combined(NormAndDropout, tmp_path), _batches(NormAndDropout)[0]
    wanted = resmem.predictions(batch).resmem
    other = copied(resmem)
    torch.testing.assert_close(other.predictions(batch).resmem, wanted)
    _statistics(other.base)
    with pytest.raises(StaleMemoryError):
        other.predictions(batch)
    torch.testing.assert_close(resmem.predictions(batch).resmem, wanted)
