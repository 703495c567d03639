"""What is said of an error in a function of the user's, and what is passed on as it is."""

import lightning.pytorch as L
import pytest
import torch

from lightning_resmem import HeadError, InputError
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.calling import calling, calling_forward
from lightning_resmem.model.times import read_times

PAIR = [torch.zeros(3, 8), torch.zeros(3)]
ASKED = {
    "targets_fn": lambda fails: BatchReader(targets_fn=fails).targets(PAIR),
    "ids_fn": lambda fails: BatchReader(ids_fn=fails).ids(PAIR),
    "forward_fn": lambda fails: BatchReader(forward_fn=lambda _, batch: fails(batch)).run(L.LightningModule(), PAIR),
    "times_fn": lambda fails: read_times(fails, PAIR),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize(
    "fails",
    [lambda batch: batch["x"], lambda batch: batch[2], lambda batch: batch.x],
    ids=["key", "place", "attribute"],
)
def test_an_error_names_the_argument_the_batch_and_the_way_out(name, fails):
    expected = (
        rf"^{name} failed for a batch that is a list of Tensor of shape \(3, 8\), Tensor of shape \(3,\) "
        r"\((TypeError|IndexError|AttributeError): .*\): give one that .*lambda "
    )
    with pytest.raises(InputError, match=expected) as caught:
        ASKED[name](fails)
    assert isinstance(caught.value.__cause__, TypeError | IndexError | AttributeError)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x": PAIR[0], "n": 3}, r"a dict of 'x': Tensor of shape \(3, 8\), 'n': int"),
        ((), "an empty tuple"),
        (PAIR[0], r"a Tensor of shape \(3, 8\)"),
    ],
    ids=["dict", "empty", "tensor"],
)
def test_what_a_batch_is(batch, said):
    with pytest.raises(InputError, match=f"^f failed for a batch that is {said} \\("), calling("f", batch, "give g."):
        raise KeyError("z")


@pytest.mark.parametrize(
    "error",
    [
        HeadError("ours"),
        torch.OutOfMemoryError("full"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
        KeyboardInterrupt(),
    ],
    ids=["ours", "out of memory", "CPU", "cuDNN", "interrupt"],
)
def test_errors_that_stay(error):
    with pytest.raises(type(error)) as caught, calling("f", PAIR, "give g."):
        raise error
    assert caught.value is error


def test_how_forward_was_called_is_told_where_it_may_be_the_cause():
    def said(error, batch=PAIR, args=(PAIR[0],)):
        with pytest.raises(type(error)) as caught, calling_forward("Net", batch, args, {"n": 3}):
            raise error
        return [str(caught.value), *getattr(caught.value, "__notes__", ())]

    told = said(ValueError("bad"))[1]
    assert "Net(Tensor of shape (3, 8), n=int) for a batch that is a list of Tensor of shape (3, 8), Tensor" in told
    assert "If forward wants the whole batch, " in told
    assert "model(batch['x'])" in said(ValueError("bad"), {"x": PAIR[0], "outcome": PAIR[1]})[1]
    assert "whole batch" not in said(ValueError("bad"), PAIR[0])[1]  # it got that
    for error in (HeadError("The embedding is a tuple."), torch.OutOfMemoryError("full")):
        assert said(error) == [str(error)]


def test_an_error_about_another_one_is_told_from_running_out_of_memory():
    with pytest.raises(InputError, match=r"\(RuntimeError: bad\)"), calling("f", PAIR, "give g."):
        raise RuntimeError(ValueError("bad"))
