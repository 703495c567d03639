"""Which positions of sequences are rows, and what their targets are."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.sequences import RowReader, merged
from lightning_resmem.tasks import Multiclass, Regression

SHAPE = (2, 4, 9)
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
MASK = (TOKENS > 0).long()


def reader(model=None, task=None, provenance=None, **options):
    return RowReader(BatchReader(**options), model or nn.Linear(1, 1), task or Multiclass(), provenance)


def test_the_last_position_and_those_before_padding_have_no_next_token():
    found = reader().targets({"input_ids": TOKENS, "attention_mask": MASK}, SHAPE)
    assert found.kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert found.targets[found.kept].tolist() == [2, 3, 4, 6]


def test_positions_are_counted_from_the_first_that_is_no_padding():
    batch = {"input_ids": TOKENS.flip(1), "attention_mask": MASK.flip(1)}
    found = reader().targets(batch, SHAPE)
    assert found.kept.tolist() == [[True, True, True, False], [False, False, True, False]]
    assert found.positions[found.kept].tolist() == [0, 1, 2, 0]


def test_the_mask_of_an_encoder_says_nothing_of_the_decoder():
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    batch = {"input_ids": TOKENS, "attention_mask": MASK, "labels": torch.full((2, 4), 3)}
    assert reader(model).targets(batch, SHAPE).kept.all()
    assert reader().targets(batch, SHAPE).kept.sum() == 6
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert reader(model).targets(batch, SHAPE).kept.sum() == 7


def test_masked_tokens_are_not_shifted_whatever_comes_later():
    rows, labels = reader(), torch.full((2, 4), -100)
    labels[0, 1] = 7  # the input there is masked
    batch = {"input_ids": TOKENS, "labels": labels}
    assert rows.targets(batch, SHAPE).kept.nonzero().tolist() == [[0, 1]]
    assert rows.describe() == {"shift": "0"}
    unchanged = {"input_ids": TOKENS, "labels": labels.clone().masked_fill(labels == 7, 2)}
    assert rows.targets(unchanged, SHAPE).kept.nonzero().tolist() == [[0, 1]]
    with pytest.raises(InputError, match="so its targets cannot be told"):  # what is right is not its inputs
        rows.targets({"input_ids": TOKENS}, SHAPE)


def test_a_batch_without_labels_decides_nothing():
    rows = reader()
    batch = {"input_ids": TOKENS, "labels": torch.full((2, 4), -100)}
    assert not rows.targets(batch, SHAPE).kept.any()
    assert rows.describe() == {}


def test_a_memory_knows_whether_labels_are_shifted():
    labels = torch.full((2, 4), -100)
    labels[0, 1] = 2  # as the input there, by chance
    batch = {"input_ids": TOKENS, "labels": labels}
    for shift, place in (("0", [0, 1]), ("1", [0, 0])):
        assert reader(provenance={"shift": shift}).targets(batch, SHAPE).kept.nonzero().tolist() == [place]
    given = reader(provenance={"shift": "1"}, targets_fn=lambda batch: batch["labels"])
    assert given.targets(batch, SHAPE).kept.nonzero().tolist() == [[0, 1]]


def test_numbers_for_each_position():
    targets = torch.randn(2, 4, 9)
    found = reader(task=Regression()).targets((torch.randn(2, 4), targets), SHAPE)
    assert found.kept.all()
    assert torch.equal(found.targets, targets)


def test_ranks_that_found_different_things():
    assert merged([None, {}, {"shift": "1"}, {"shift": "1"}]) == {"shift": "1"}
    with pytest.raises(InputError, match="On some ranks the labels are the inputs"):
        merged([{"shift": "0"}, {"shift": "1"}])


LEFT = TOKENS.flip(1)
UNLABELLED = LEFT.where(LEFT > 0, -100)
NO_MASK = "begin with padding, and it has no attention_mask: .* Let the collate_fn return attention_mask"


def test_padding_on_the_left_without_a_mask():
    knows = nn.Sequential(nn.Embedding(9, 2, padding_idx=0))
    configured = nn.Linear(1, 1)
    configured.config = SimpleNamespace(pad_token_id=0)
    for model, batch in (
        (None, {"input_ids": LEFT, "labels": UNLABELLED}),
        (None, (LEFT, UNLABELLED)),
        (knows, {"input_ids": LEFT}),
        (configured, {"input_ids": LEFT, "labels": LEFT}),
    ):
        rows = reader(model)
        with pytest.warns(ResMemWarning, match=NO_MASK):
            rows.targets(batch, SHAPE)
        with warnings.catch_warnings(action="error"):  # once
            rows.targets(batch, SHAPE)


def test_no_padding_on_the_left():
    knows, prompts = nn.Embedding(9, 2, padding_idx=1), TOKENS.clone()
    prompts[0, :2] = prompts[1, :1] = -100
    masked = torch.full((2, 4), -100)
    masked[:, 2] = 7
    with warnings.catch_warnings(action="error"):
        for model, batch in (
            (knows, {"input_ids": TOKENS}),  # it begins with the padding's token, but for once
            (None, {"input_ids": TOKENS, "labels": TOKENS.where(TOKENS > 0, -100)}),
            (None, {"input_ids": TOKENS, "labels": prompts}),
            (None, {"input_ids": TOKENS, "labels": masked}),
            (nn.Embedding(9, 2, padding_idx=0), {"input_ids": LEFT, "attention_mask": (LEFT > 0).long()}),
            (nn.Embedding(9, 2, padding_idx=0), (torch.randn(2, 4), TOKENS)),
        ):
            reader(model).targets(batch, SHAPE)


def test_what_is_no_padding_on_the_left():
    users = nn.ModuleList([nn.Embedding(9, 2), nn.Embedding(9, 2, padding_idx=0)])
    knows, ends = nn.Embedding(9, 2, padding_idx=0), nn.Linear(1, 1)
    ends.config = SimpleNamespace(pad_token_id=0, eos_token_id=[8, 0])
    encodes = nn.ModuleList([knows])
    encodes.config = SimpleNamespace(pad_token_id=0, is_encoder_decoder=True)
    an_empty_one = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [0, 0, 0, 0]])
    with warnings.catch_warnings(action="error"):
        for model, batch in (
            (users, {"input_ids": LEFT, "labels": LEFT}),  # a token like others; padding of users
            (knows, {"input_ids": an_empty_one}),
            (None, {"input_ids": an_empty_one, "labels": an_empty_one.where(an_empty_one > 0, -100)}),
            (ends, {"input_ids": LEFT, "labels": LEFT}),  # packed: two texts end
            (encodes, {"input_ids": LEFT, "attention_mask": (LEFT > 0).long(), "labels": TOKENS}),
        ):
            reader(model).targets(batch, (len(batch["input_ids"]), 4, 9))


def test_the_embedding_that_reads_the_tokens_knows_their_padding():
    for others in (nn.Embedding(6, 2), nn.Embedding(30, 2), nn.Embedding(9, 2, padding_idx=0)):
        model = nn.ModuleList([others, nn.Embedding(9, 2, padding_idx=0)])  # as wide as the head
        with pytest.warns(ResMemWarning, match=NO_MASK):
            reader(model).targets({"input_ids": LEFT}, SHAPE)


def test_only_the_first_batches_are_looked_at_for_padding():
    rows = reader(nn.Embedding(9, 2, padding_idx=0))
    with warnings.catch_warnings(action="error"):
        for _ in range(3):
            rows.targets({"input_ids": TOKENS}, SHAPE)
        rows.targets({"input_ids": LEFT}, SHAPE)
