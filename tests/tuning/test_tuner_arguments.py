"""What the tuner refuses, and that the message names the argument."""

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.errors import EmptyMemoryError, InputError
from lightning_resmem.tasks import TASKS
from lightning_resmem.tuning.tuner import GridTuner
from tests.tuning.validation import AXES, filled, rows


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("value", [[], (), 3, "1", None, np.array([1.0]), {1: 1}])
def test_candidates_have_to_be_a_list(name, value):
    with pytest.raises(InputError, match=f"{name}=.*give a list of candidates, at least one"):
        GridTuner(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", 2.5),
        ("k", True),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", float("nan")),
        ("softmax_temperature", 0),
        ("softmax_temperature", float("inf")),
        ("strength", -0.1),
        ("strength", "1"),
    ],
)
def test_candidates_have_to_be_in_range(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        GridTuner(**{name: [1, value]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_negative_flip_rate", -0.1),
        ("max_negative_flip_rate", 1.1),
        ("max_negative_flip_rate", "0.1"),
        ("refinements", -1),
        ("refinements", 1.5),
        ("refinements", True),
        ("noise", -1),
        ("noise", float("nan")),
        ("noise", None),
        ("gate", 1),
    ],
)
def test_options_have_to_be_in_range(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}: give"):
        GridTuner(**{name: value})


@pytest.mark.parametrize("objective", ["acc", "loss", None, 1])
def test_objective_has_to_be_known(objective):
    with pytest.raises(InputError, match=f"objective={objective!r}.*give .*torchmetrics Metric"):
        GridTuner(objective=objective)


def test_a_regression_has_no_flips():
    with pytest.raises(InputError, match=r"max_negative_flip_rate=0.1 is not for task=Regression"):
        GridTuner(max_negative_flip_rate=0.1).check(TASKS["regression"]())


def test_no_validation_rows():
    embeddings, outputs, targets = rows(0, "multiclass", seed=2)
    with pytest.raises(InputError, match="at least one validation row"):
        GridTuner().tune(filled(), embeddings, outputs, targets)


def test_an_empty_memory():
    with pytest.raises(EmptyMemoryError):
        GridTuner().tune(LocalMemory(), *rows(3, "multiclass", seed=2))


@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_not_finite(which):
    validation = list(rows(5, "multiclass", seed=2))
    validation[which][3, 1] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite entries in rows 3"):
        GridTuner().tune(filled(), *validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeddings": None}, "embeddings of type NoneType cannot be made a tensor"),
        ({"outputs": "many"}, "outputs of type str cannot be made a tensor"),
        ({"targets": None}, "targets of type NoneType"),
        ({"outputs": torch.zeros(3)}, "outputs has shape"),
        ({"targets": torch.zeros(2).long()}, "embeddings, outputs and targets have shapes.*must be the same"),
        ({"embeddings": torch.zeros(5, 3)}, r"embeddings has shape \(5, 3\), the memory's keys have width 4"),
        ({"ids": torch.arange(4)}, r"ids has shape \(4,\), expected \(5,\)"),
        ({"outputs": torch.zeros(5, 4)}, "outputs has 4 columns, the memory was filled with 3"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    validation = dict(zip(("embeddings", "outputs", "targets"), rows(5, "multiclass", seed=2), strict=True))
    with pytest.raises(InputError, match=message):
        GridTuner().tune(filled(), **{**validation, **arguments})
