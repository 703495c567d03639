"""A memory that an earlier version saved is loaded, and answers as it did.

`data/saved_before/` holds memories with what they predicted, each as `NAME/` and `NAME.json`. `make.py` beside them
made them, run with the version of the time. They stay as they are; a new format gets new ones beside them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory
from tests import oracle

SAVED = Path(__file__).parent / "data" / "saved_before"
NAMES = sorted(path.stem for path in SAVED.glob("*.json"))


def from_stored(memory: LocalMemory, told: dict[str, torch.Tensor], tail_is_even: bool) -> np.ndarray:
    """Combined predictions of sparse values, by the letter.

    When the memory was saved, the tail of a row was spread evenly; today it has the shape of the query's prediction.
    """
    params, values = memory.params, memory.fetch(memory.ids).tensors()
    distances, ids = memory.search(told["queries"], params.k)
    base = oracle.softmax(told["outputs"].numpy(), params.softmax_temperature)
    weights, places = oracle.weights(distances.numpy(), params.sigma), np.searchsorted(memory.ids.numpy(), ids.numpy())
    raised = np.exp(values["log_probabilities"].double().numpy() / params.softmax_temperature)
    others = base.shape[1] - raised.shape[1]
    tails = others * np.exp((values["log_tail"].double().numpy() - np.log(others)) / params.softmax_temperature)
    combined = base.copy()
    for query in range(len(base)):
        for weight, place in zip(weights[query], places[query], strict=True):
            kept = np.zeros(base.shape[1])
            kept[values["classes"][place].long().numpy()] = raised[place]
            shape = (kept == 0) / others if tail_is_even else base[query]
            combined[query] -= weight * (kept + tails[place] * shape) / (raised[place].sum() + tails[place])
            combined[query, values["targets"][place]] += weight
    return combined


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
    if name == "sparse":
        np.testing.assert_allclose(from_stored(memory, told, tail_is_even=True), told["resmem"], atol=1e-6)
        told["resmem"] = torch.from_numpy(from_stored(memory, told, tail_is_even=False)).float()
    for what, values in answers.items():
        torch.testing.assert_close(values, told[what], rtol=0, atol=1e-6)
