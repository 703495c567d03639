"""A memory that an earlier version saved is loaded, and answers as it did.

`data/saved_before/` holds memories with what they predicted, each as `NAME/` and `NAME.json`. `make.py` beside them
made them, run with the version of the time. They stay as they are; a new format gets new ones beside them.
"""

import json
from pathlib import Path

import pytest
import torch

from lightning_resmem import LocalMemory

SAVED = Path(__file__).parent / "data" / "saved_before"
NAMES = sorted(path.stem for path in SAVED.glob("*.json"))


def test_there_are_memories_of_each_kind() -> None:
    assert NAMES == ["dense-with-gate", "faiss", "multilabel", "regression", "sparse"]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_it_did(name: str, mmap: bool) -> None:
    if name == "faiss":
        pytest.importorskip("faiss")
    told = {what: torch.tensor(value) for what, value in json.loads((SAVED / f"{name}.json").read_text()).items()}
    memory = LocalMemory.load(SAVED / name, mmap=mmap)
    found = memory.search(told["queries"], k=3)
    predictions = memory.predictions(told["queries"], told["outputs"])
    assert torch.equal(found.ids, told["ids"])
    # The same numbers; another processor multiplies matrices in another order, which shows in float32's last digit.
    answers = {"distances": found.distances, **predictions._asdict()}
    for what, values in answers.items():
        torch.testing.assert_close(values, told[what], rtol=0, atol=1e-6)
