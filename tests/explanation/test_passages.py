"""The text around rows that are positions of sequences, and where it is shown."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_resmem import InputError, LocalMemory, ResMemParams, ResMemWarning, explain, passages
from lightning_resmem.memory.token_ids import STRIDE
from lightning_resmem.reporting.html_report import write_report
from lightning_resmem.reporting.pictures import row_lookup, text_lookups

LONG = [token % 26 for token in range(40)]


def words(tokens):
    return "".join(chr(97 + token) for token in tokens)


def test_text_around_positions():
    text = passages([[7, 4, 11, 11, 14], LONG], words)
    assert [text(place) for place in range(5)] == ["h▸ello", "he▸llo", "hel▸lo", "hell▸o", "hello▸"]
    assert text(STRIDE + 30) == "pqrstuvwxyzabcde▸fghi"
    with pytest.raises(InputError, match="dataset is a list that has no row 2"):
        text(2 * STRIDE)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [7, 8, 0], "labels": [8, -100, -100]},
        {"input_ids": torch.tensor([7, 8, 0])},
        {"input_ids": torch.tensor([0, 0, 7, 8, 0]), "attention_mask": torch.tensor([0, 0, 1, 1, 1])},
        {"input_ids": torch.tensor([0, 7, 8, 0, 0, 0]), "attention_mask": torch.tensor([0.0, 1, 1, 1, 0, 0])},
        (torch.tensor([7, 8, 0]), torch.tensor([8, 0, 1])),
        ({"input_ids": [0, 7, 8, 0], "attention_mask": [0, 1, 1, 1]}, torch.tensor(1)),
        torch.tensor([7, 8, 0]),
        np.array([7, 8, 0], dtype=np.uint16),
        list(np.array([7, 8, 0])),
    ],
    ids=str,
)
def test_sequences_of_every_kind(row):
    assert passages([row], words)(1) == "hi▸a"


@pytest.mark.parametrize(
    "row",
    [
        "hi",
        {"text": "hi"},
        torch.tensor([0.25, 0.5, 0.75]),
        torch.zeros(2, 2, dtype=torch.long),
        (),
        {"input_ids": [[1], [2, 3]]},
        pytest.param(Image.new("L", (4, 4)), id="image"),
    ],
    ids=str,
)
def test_rows_without_tokens(row):
    assert passages([row], words)(0) is None


def test_what_decodes_to_no_text():
    with pytest.raises(InputError, match="decode returned a list for a list of tokens, expected text"):
        passages([LONG], lambda tokens: tokens)(0)


def test_text_until_decode_fails():
    """Also for the other dataset, and told once."""
    rows = DataLoader([LONG])

    def fails(tokens):
        return words(tokens) if LONG[9] not in tokens else words(None)

    look, look_behind = text_lookups(fails, rows, rows)
    assert look(2) == "abc▸defg"
    with pytest.warns(ResMemWarning, match="shown without text: TypeError") as told:
        assert [look(12), look(2), look_behind(2)] == [None] * 3
    assert len(told) == 1
    assert [find(2) for find in text_lookups(None, rows, rows)] == [None, None]


def test_datasets_of_several_loaders():
    rows = [DataLoader([LONG[:3], LONG[:5]]), DataLoader([LONG])]
    assert row_lookup(rows, words)(2 * STRIDE + 2) == "abc▸defg"


def test_tables_and_the_page_show_it(tmp_path):
    dataset = [[1, 2, 1], [0, ord("<") - 97, 2]]  # "bcb", and what is markup
    memory = LocalMemory(params=ResMemParams(k=2))
    ids = torch.tensor([0, 1, STRIDE, STRIDE + 1])
    memory.add(torch.eye(4), torch.zeros(4, 3), torch.tensor([2, 1, 1, 2]), ids)
    text = passages(dataset, words)
    [table] = explain(memory, torch.eye(4)[1:2], torch.zeros(1, 3)).tables(text=text)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    assert "bc▸b" in console.export_text()
    memory.save(tmp_path / "memory")
    page = write_report(tmp_path / "memory", tmp_path / "page.html", text=text).read_text(encoding="utf-8")
    assert "<q>bc▸b</q>" in page
    assert "<q>a▸&lt;c</q>" in page
    assert "<q>" not in write_report(tmp_path / "memory", tmp_path / "page.html").read_text(encoding="utf-8")
