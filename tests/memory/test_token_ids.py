"""Ids that say the sequence and the position."""

import pytest
import torch

from lightning_resmem.errors import InputError
from lightning_resmem.memory.token_ids import STRIDE, token_ids


def test_the_longest_sequence_and_the_last_one():
    last = torch.tensor([2**43 - 1])
    assert token_ids(last, torch.tensor([[STRIDE - 1]])).tolist() == [[2**63 - 1]]
    with pytest.raises(InputError, match="A sequence has 1,048,577 positions, ids have room for 1,048,576: cut it"):
        token_ids(last, torch.tensor([[STRIDE]]))
    with pytest.raises(
        InputError, match=r"ids from 0 to 8796093022208, .* room for 0 to 8796093022207: give an ids_fn"
    ):
        token_ids(torch.tensor([0, 2**43]), torch.zeros(2, 1, dtype=torch.int64))
