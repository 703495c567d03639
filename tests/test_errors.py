"""What is of a wrong type is named, with its value and the way out, wherever it is given."""

import pytest
import torch

from lightning_resmem import GridTuner, InputError, LocalMemory, ResMemCallback, ResMemModule, explain, memorize
from lightning_resmem.explanation.influence import influence, usefulness
from lightning_resmem.explanation.label_errors import label_errors
from lightning_resmem.reporting import plots
from tests.models import CallsSelf, Data, make, memory_for, trainer

ROWS = torch.zeros(3, 4), torch.zeros(3, 4), torch.arange(3)


@pytest.fixture
def resmem(tmp_path):
    return memorize(trainer(tmp_path), make(CallsSelf), Data(), memory=memory_for(CallsSelf))


@pytest.mark.parametrize(
    "use",
    [
        lambda memory: label_errors(memory),
        lambda memory: usefulness(memory, *ROWS),
        lambda memory: influence(memory, 0, ROWS[0]),
        lambda memory: explain(memory, *ROWS[:2]),
        lambda memory: GridTuner().tune(memory, *ROWS),
        lambda memory: GridTuner().tune_leave_one_out(memory),
        lambda memory: ResMemModule(make(CallsSelf), memory),
        lambda memory: ResMemCallback(memory),
        lambda memory: memorize(trainer("."), make(CallsSelf), Data(), memory=memory),
    ],
)
def test_what_is_no_memory(use):
    for memory, named in (("x", "a str, 'x'"), (3, "a int, 3"), (LocalMemory, "a ABCMeta, <class ")):
        with pytest.raises(InputError, match=rf"^memory is {named}.*: give a memory, such as LocalMemory\(\)\.$"):
            use(memory)


@pytest.mark.parametrize("batch", [None, "x", b"x", 3, 0.5])
@pytest.mark.parametrize("method", ["explain", "predictions"])
def test_what_is_no_batch(resmem, method, batch):
    with pytest.raises(InputError, match=rf"^batch is a \w+, {batch!r}: give a batch .* next\(iter\(dataloader\)\)"):
        getattr(resmem, method)(batch)


@pytest.mark.parametrize("name", [None, 3, ["a"]])
def test_what_names_no_artifact(name):
    with pytest.raises(InputError, match=r"^name is a \w+, .*: give an artifact, such as \"entity/project/memory:v3\""):
        ResMemModule.from_wandb(name, base=make(CallsSelf))


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (plots.tuning_map, "tuning is .*: give a TuningResult, such as ResMemCallback.tuning"),
        (plots.by_distance, "evaluation is .*: give an Evaluation, such as ResMemCallback.evaluation"),
        (plots.reliability, "evaluation is .*: give an Evaluation"),
        (plots.flips, "evaluation is .*: give an Evaluation"),
        (plots.pixels, "figure is .*: give a figure; plots return None"),
    ],
)
@pytest.mark.parametrize("value", [None, "x"])
def test_what_cannot_be_plotted(plot, message, value):
    with pytest.raises(InputError, match=f"^{message}"):
        plot(value)


def test_long_values_are_cut():
    with pytest.raises(InputError) as caught:
        label_errors([torch.zeros(9)] * 1000)
    assert len(str(caught.value)) < 300
