"""Bits per byte, and answers to sequences a block at a time."""

import math

import numpy as np
import pytest
import torch

from lightning_resmem import BitsPerByte, InputError, LocalMemory, ResMemParams, SparseConfig
from lightning_resmem.memory import answers
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.sequences import RowTargets
from tests.metrics.runs import evaluate, loader_of


def test_bits_per_byte_do_not_depend_on_batches():
    draw = np.random.default_rng(0)
    probabilities, targets = draw.dirichlet(np.ones(5), size=40), draw.integers(5, size=40)
    lengths = [len("aé∀𝄞z"[token].encode()) for token in range(5)]
    metric = BitsPerByte.of(lambda ids: "".join("aé∀𝄞z"[token] for token in ids), vocabulary=5)
    for part in np.array_split(np.arange(40), [3, 30]):
        metric.update(torch.tensor(probabilities[part]), torch.tensor(targets[part]))
    wanted = -np.log2(probabilities[range(40), targets]).sum() / sum(lengths[target] for target in targets)
    assert metric.compute() == pytest.approx(wanted)


def test_lengths_that_are_none():
    for lengths in ([], [1, -1], [[1]], [math.inf]):
        with pytest.raises(InputError, match="give the bytes of each token"):
            BitsPerByte(lengths)
    with pytest.raises(InputError, match="lengths has 2 entries, and there are 3 tokens"):
        BitsPerByte([1, 2]).update(torch.ones(1, 3) / 3, torch.tensor([0]))


@pytest.mark.parametrize("values", ["dense", SparseConfig(4)], ids=str)
def test_blocks_of_positions_are_scored_as_all_of_them(values, monkeypatch, tmp_path):
    """Also where an embedding or an output is not finite."""
    memory = LocalMemory(params=ResMemParams(k=3, sigma=0.5, softmax_temperature=1.3), values=values)
    memory.add(torch.randn(20, 3), torch.randn(20, 30), torch.randint(30, (20,)))
    memory.provenance["stride"] = str(2**20)
    embeddings, outputs = torch.randn(2, 6, 3), torch.randn(2, 6, 30)
    embeddings[0, 4], outputs[1, 1, 7] = torch.nan, torch.inf
    targets, kept = torch.randint(30, (2, 6)), torch.rand(2, 6) < 0.7
    kept[0, 4] = kept[1, 1] = True
    read = RowTargets(targets, kept, torch.arange(6).expand(2, 6))
    whole = Answer.of(memory, embeddings, outputs)
    monkeypatch.setattr(answers, "_BLOCK_ENTRIES", 4 * 30)
    found = Found.of(memory, embeddings, outputs)
    torch.testing.assert_close(found.combined(memory), whole.combined(memory.task).reshape(2, 6, 30))
    usable = whole.is_combined
    resmem = found.resmem(memory).flatten(0, 1)
    torch.testing.assert_close(resmem[usable], whole.predictions.resmem[usable])

    boards = [Scoreboard(memory, "test", [loader_of(2)]) for _ in range(2)]
    boards[0].update_tokens(found, read)
    boards[1].update(whole.rows(kept.flatten()), targets[kept])
    (seen,), (wanted,) = (evaluate(board, tmp_path) for board in boards)
    two_sequences = {"gain_error": math.nan}  # tell no error
    assert seen.scores == pytest.approx(wanted.scores | two_sequences, nan_ok=True)
    assert (seen.rows, seen.left_out, seen.ignored) == (int(kept.sum()) - 2, 2, int((~kept).sum()))


def test_bytes_of_tokenizers_that_strip_or_split_characters():
    words = [" the", " cat", "s"]
    metric = BitsPerByte.of(lambda ids: "".join(words[token] for token in ids).lstrip(), vocabulary=3)
    assert metric.lengths.tolist() == [4, 4, 1]
    metric = BitsPerByte.of(lambda ids: bytes(ids).decode(errors="replace"), vocabulary=256)
    assert metric.lengths[list("é日".encode())].sum() == 5


def test_rows_without_any_neighbor_are_scored_as_the_base():
    """Those that are NaN are not."""
    memory = LocalMemory(params=ResMemParams(k=2, sigma=0.5, combined_temperature=1.5))
    times = torch.tensor([[0.0, 10.0]]).expand(20, 2)
    memory.add(torch.randn(20, 3), torch.randn(20, 4), torch.randint(4, (20,)), times=times)
    embeddings, outputs = torch.randn(5, 3), torch.randn(5, 4)
    embeddings[4] = torch.nan
    asked = memory.at([1.0, 20.0, 1.0, 20.0, 20.0])
    answer = Answer.of(asked, embeddings, outputs)
    assert answer.is_combined.tolist() == [True, True, True, True, False]
    base = outputs.softmax(dim=1)
    for prediction in answer.predictions:
        torch.testing.assert_close(prediction[[0, 2, 4]], base[[0, 2, 4]])
    assert not torch.allclose(answer.predictions.resmem[1], base[1])
    torch.testing.assert_close(answer.combined(memory.task)[:4].exp(), answer.predictions.resmem[:4])
    found = Found.of(asked, embeddings[None], outputs[None])
    torch.testing.assert_close(found.resmem(asked)[0, :4], answer.predictions.resmem[:4])
    memory.params = ResMemParams(k=2, sigma=0.5, strength=0.0, combined_temperature=1.5)
    torch.testing.assert_close(memory.at(20.0).predict(embeddings[:4], outputs[:4]), base[:4])
