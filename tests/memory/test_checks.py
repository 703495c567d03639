"""Rows of all kinds of containers, and what is said of rows that do not fit."""

import warnings

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, Multilabel, Regression, ResMemParams, ResMemWarning

pandas = pytest.importorskip("pandas")


def test_series_and_frames_are_rows_whatever_their_index():
    index = [5, 9, 2, 7]
    keys = pandas.DataFrame(np.eye(4, 3), index=index, columns=["a", "b", "c"])
    outputs = pandas.DataFrame({"no": [0.0, 1, 2, 3], "yes": [1.0, 0, 0, 0]}, index=index)
    targets = pandas.Series([1, 0, 0, 1], index=index)
    memory = LocalMemory(params=ResMemParams(k=1, sigma=1.0))
    memory.add(keys, outputs, targets, ids=pandas.Series(index, index=index))
    memory.build()
    assert memory.ids.tolist() == [2, 5, 7, 9]
    rows = memory.fetch(pandas.Index([5, 9, 2, 7]))
    assert rows.targets.tolist() == [1, 0, 0, 1]
    assert rows.outputs.tolist() == outputs.to_numpy().tolist()
    assert memory.search(keys.iloc[:2], 1).ids.tolist() == [[5], [9]]
    assert memory.predict(keys, outputs).argmax(dim=1).tolist() == [1, 0, 0, 1]
    with pytest.raises(InputError, match="targets of type Series cannot be made a tensor"):
        memory.add(keys, outputs, pandas.Series(["a", "b", "c", "d"]))


@pytest.mark.parametrize("task", [Regression(), Multilabel()])
def test_one_number_a_row_gets_the_right_way_out(task):
    memory, keys, outputs, targets = LocalMemory(task), torch.randn(20, 3), torch.randn(20), torch.ones(20)
    with pytest.raises(InputError, match=r"outputs has shape \(20,\), expected \(N, C\): .* give outputs\[:, None\]"):
        memory.add(keys, outputs, targets)
    memory.add(keys, outputs[:, None], targets)
    memory.build()
    with pytest.raises(InputError, match=r"outputs has shape \(2,\), expected \(B, C\): .* give outputs\[:, None\]"):
        memory.predict(keys[:2], outputs[:2])
    assert memory.predict(keys[:2], outputs[:2, None]).shape == (2, 1)


def test_probabilities_in_the_place_of_logits_are_noticed():
    keys, logits, targets = torch.randn(50, 3), torch.randn(50, 4), torch.randint(4, (50,))
    for probabilities in (logits.softmax(1), logits.softmax(1).half(), logits.softmax(1).numpy()):
        with pytest.warns(ResMemWarning, match=r"look like probabilities.*give logits.*outputs\.log\(\)"):
            LocalMemory().add(keys, probabilities, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResMemWarning)
        LocalMemory().add(keys, logits, targets)
        LocalMemory().add(keys, logits.log_softmax(1), targets)
        LocalMemory().add(keys, logits.sigmoid(), targets)  # within [0, 1], but no distributions
        LocalMemory(Multilabel()).add(keys, logits.softmax(1), torch.eye(4)[targets])
        LocalMemory(Regression()).add(keys, logits.softmax(1), torch.eye(4)[targets])
