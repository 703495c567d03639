"""The rule that tells a gain from luck, on numbers made for it."""

import torch

from lightning_resmem.tuning.selection import (
    Candidates,
    best_gain,
    is_evident,
    least_loss,
    near_best,
)


def made(gain, gain_error=0.01, loss=None, loss_gain=0.0, loss_error=0.01, allowed=True):
    count = len(gain)

    def column(value):
        return torch.tensor(value if isinstance(value, list) else [value] * count)

    loss = [1.0] * count if loss is None else loss
    return Candidates(*(column(part) for part in (gain, gain_error, loss, loss_gain, loss_error, allowed)))


def test_the_largest_gain_that_is_allowed_is_the_best():
    assert best_gain(made([0.0, 0.1, 0.2])) == 2
    assert best_gain(made([0.0, 0.1, 0.2], allowed=[True, True, False])) == 1
    assert best_gain(made([0.0, 0.2, 0.2], loss=[1.0, 0.9, 0.8])) == 2
    assert best_gain(made([0.0, 0.2, 0.2 + 1e-12])) == 1  # equal but for rounding


def test_the_loss_decides_among_what_noise_cannot_tell_apart():
    found = made([0.0, 0.10, 0.09, 0.05, -0.001], gain_error=0.01, loss=[1.0, 0.9, 0.8, 0.1, 0.0])
    assert near_best(found, 1, noise=1.0).tolist() == [1, 2]
    assert least_loss(found, near_best(found, 1, noise=1.0)) == 2
    assert near_best(found, 1, noise=0.0).tolist() == [1]
    # Never one that is worse than the base, nor one that loses too many answers.
    assert near_best(found, 1, noise=100.0).tolist() == [0, 1, 2, 3]
    assert near_best(found._replace(allowed=torch.tensor([True, True, False, True, True])), 1, 100.0).tolist() == [
        0,
        1,
        3,
    ]


def test_a_single_row_has_no_error_and_still_a_best():
    found = made([0.0, 1.0], gain_error=float("inf"))
    assert near_best(found, 1, noise=0.0).tolist() == [1]
    assert near_best(found, 1, noise=1.0).tolist() == [0, 1]


def test_what_helps_is_beyond_noise():
    def evident(gain, loss_gain, noise=1.0, by_loss=False):
        return is_evident(made([0.0, gain], loss_gain=[0.0, loss_gain]), 1, noise, by_loss)

    assert evident(0.021, -1.0)  # two errors of the score, whatever the loss
    assert not evident(0.019, -1.0)
    assert not evident(0.019, 0.009)
    assert evident(0.001, 0.011)  # one error of the loss
    assert evident(0.0, 0.011)
    assert not evident(-0.001, 1.0)
    assert evident(-0.001, 0.011, by_loss=True)
    assert not evident(1.0, 0.009, by_loss=True)
    assert evident(0.001, -1.0, noise=0.0)
    assert not evident(0.0, 0.0, noise=0.0)
