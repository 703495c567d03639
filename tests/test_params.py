"""ResMemParams refuses early, and says what, which value, and what to do."""

import dataclasses
import json
import pickle
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, ResMemError, ResMemParams

NAN, INF = float("nan"), float("inf")

# No number at all, whatever the argument.
NO_NUMBERS = [
    None,
    "3",
    "three",
    b"3",
    True,
    False,
    np.True_,
    torch.tensor(True),
    [3],
    (),
    {},
    1 + 2j,
    torch.tensor(1 + 2j),
    np.array([1.0, 2.0]),
    torch.tensor([1.0, 2.0]),
    object,
    NAN,
    INF,
    -INF,
    np.float32("nan"),
    torch.tensor(INF),
]
BAD = [
    *(("k", value) for value in [0, -1, -53, 1.5, 1.0, np.int64(0), np.float32(3), torch.tensor(0), torch.tensor(1.5)]),
    *(("sigma", value) for value in [0, 0.0, -0.0, -1, -1e-9, np.float64(0), torch.tensor(-1.0), 10**400]),
    *(("softmax_temperature", value) for value in [0, 0.0, -0.0, -1, -1e-9, np.float32(-2), torch.tensor(0), 10**400]),
    *(("strength", value) for value in [-1, -1e-9, np.float64(-0.5), torch.tensor(-1.0), 10**400]),
    *((name, value) for name in ("k", "sigma", "softmax_temperature", "strength") for value in NO_NUMBERS),
]


def plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic | torch.Tensor) and value.ndim == 0 else value


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:30])
def test_bad_values_are_refused_with_name_value_and_way_out(name, value):
    with pytest.raises(InputError) as caught:
        ResMemParams(**{name: value})
    message = str(caught.value)
    # Numbers of NumPy and torch are shown as themselves, or as the plain number that they stand for.
    assert message.startswith((f"{name}={value!r}", f"{name}={plain(value)!r}"))
    assert re.search(r"give a (whole )?(number|distance)", message)
    assert isinstance(caught.value, ResMemError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "value"), [("k", 0), ("sigma", -1.0), ("softmax_temperature", 0), ("strength", NAN)])
def test_replace_refuses_too(name, value):
    with pytest.raises(InputError, match=name):
        dataclasses.replace(ResMemParams(), **{name: value})


@pytest.mark.parametrize("make", [np.int8, np.int64, np.uint32, torch.tensor, lambda value: np.array(value)])
def test_k_may_come_from_numpy_or_torch(make):
    params = ResMemParams(k=make(7))
    assert params.k == 7
    assert type(params.k) is int


@pytest.mark.parametrize("name", ["sigma", "softmax_temperature", "strength"])
@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        np.int64(2),
        np.float16(2),
        np.float64(2),
        np.array(2),
        torch.tensor(2),
        torch.tensor(2.0, dtype=torch.bfloat16),
        Decimal(2),
        Fraction(2),
    ],
    ids=repr,
)
def test_numbers_may_come_from_anywhere(name, value):
    params = ResMemParams(**{name: value})
    assert getattr(params, name) == 2.0
    assert type(getattr(params, name)) is float


def test_values_from_sweeps_are_plain_afterwards():
    params = ResMemParams(np.int64(5), torch.tensor(0.5), np.float32(2), np.array(0))
    assert (
        repr(params)
        == "ResMemParams(k=5, sigma=0.5, softmax_temperature=2.0, strength=0.0, gate=None, combined_temperature=1.0)"
    )
    assert json.loads(json.dumps(dataclasses.asdict(params))) == dataclasses.asdict(params)
    assert params == ResMemParams(5, 0.5, 2.0, 0.0)
    assert hash(params) == hash(ResMemParams(5, 0.5, 2.0, 0.0))


@pytest.mark.parametrize("extreme", [1e-320, 1e-45, 1e300])
def test_extreme_but_finite_numbers_are_allowed(extreme):
    params = ResMemParams(sigma=extreme, softmax_temperature=extreme, strength=extreme)
    assert (params.sigma, params.softmax_temperature, params.strength) == (extreme,) * 3


def test_strength_1_is_the_default_and_0_is_allowed():
    assert ResMemParams().strength == 1.0
    assert ResMemParams(strength=0).strength == 0.0


@pytest.mark.parametrize("name", ["k", "sigma", "softmax_temperature", "strength", "temperature"])
def test_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(ResMemParams(), name, 1)


def test_no_bare_temperature():
    with pytest.raises(TypeError, match="temperature"):
        ResMemParams(temperature=1.0)


def test_replace_and_pickle_keep_the_values():
    params = ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4, strength=0.5)
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, sigma=0.2) == ResMemParams(53, 0.2, 1.4, 0.5)
    assert params.sigma == 0.7
