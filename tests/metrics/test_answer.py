"""What the head has to return, a block of rows at a time."""

import pytest
import torch

from lightning_resmem import LocalMemory, ResMemParams, SparseConfig
from lightning_resmem.memory import answers
from lightning_resmem.metrics.answer import Answer


def test_blocks_of_rows_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5), values=SparseConfig(4))
    memory.add(torch.randn(20, 3), torch.randn(20, 30), torch.randint(30, (20,)))
    embeddings, outputs = torch.randn(11, 3), torch.randn(11, 30)
    embeddings[4] = torch.nan  # the base's own prediction stays
    whole = Answer.of(memory, embeddings, outputs).combined(memory.task)
    monkeypatch.setattr(answers, "_BLOCK_ENTRIES", 4 * 30)
    blocks = Answer.outputs_of(memory, embeddings, outputs)
    torch.testing.assert_close(blocks, whole)
    assert torch.equal(blocks[4], outputs[4])
    assert Answer.outputs_of(memory, embeddings[:0], outputs[:0]).shape == (0, 30)
