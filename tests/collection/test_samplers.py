"""Which rows loaders draw, and how evenly; `test_loaders.py` has what is read of them."""

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_resmem.collection.samplers import draws_unevenly

DATA = TensorDataset(torch.arange(10))
RARE, EQUAL = [9.0, 9.0, *[1.0] * 8], [1.0] * 10


def weighted(weights, **options):
    return DataLoader(DATA, sampler=WeightedRandomSampler(weights, 10), **options)


@pytest.mark.parametrize(
    ("loaders", "wanted"),
    [
        (weighted(RARE), True),
        (weighted(torch.tensor(RARE), batch_size=None), True),
        ([DataLoader(DATA), {"b": weighted(RARE)}], True),
        (DataLoader(DATA, sampler=DistributedSamplerWrapper(weighted(RARE).sampler, num_replicas=2, rank=0)), True),
        (weighted(EQUAL), False),
        (weighted([0.0, *[1.0] * 9]), False),  # a row that is left out
        (weighted([2.0, *[0.0] * 9]), False),
        (DataLoader(DATA, shuffle=True), False),
        (DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)), False),
        ([iter([1]), None], False),
        (None, False),
    ],
)
def test_weights_far_from_equal(loaders, wanted):
    assert draws_unevenly(loaders) is wanted
