"""The bins over batches and ranks; `test_side_by_side.py` has them beside the other metrics."""

import pytest

from lightning_resmem import InputError
from lightning_resmem.metrics.binned import NeighborhoodAccuracy, Reliability


@pytest.mark.parametrize("kind", [NeighborhoodAccuracy, Reliability])
@pytest.mark.parametrize("num_bins", [0, -1, 2.5, "10"])
def test_numbers_of_bins_are_checked(kind, num_bins):
    with pytest.raises(InputError, match="num_bins="):
        kind(num_bins)
