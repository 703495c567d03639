"""Queries and their neighbours as pictures, on digits."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_resmem import InputError, LocalMemory, Multiclass, ResMemParams, explain


@pytest.fixture
def pictured(digits):
    memory = LocalMemory(task=Multiclass(), params=ResMemParams(k=5))
    outputs = torch.zeros(200, 10)
    memory.add(digits.train.inputs[:200], outputs, digits.train.targets[:200])
    return explain(memory, digits.test.inputs[:3], outputs[:3], 4, digits.test.targets[:3])


def test_figure_shows_queries_and_neighbours(pictured, digits):
    train = [(image.view(1, 8, 8), int(target)) for image, target in zip(*digits.train, strict=True)]
    queries = digits.test.inputs[:3].view(3, 8, 8)
    figure = pictured.figure(queries, train)
    assert len(figure.axes) == 3 * 5
    for query in range(3):
        axes = figure.axes[query * 5 : query * 5 + 5]
        pictures = [np.asarray(picture.get_images()[0].get_array()) / 255 for picture in axes]
        np.testing.assert_allclose(pictures[0], queries[query] / queries[query].max(), atol=0.003)
        for picture, image, id in zip(axes[1:], pictures[1:], pictured.neighbors.ids[query].tolist(), strict=True):
            wanted = digits.train.inputs[id].view(8, 8)
            np.testing.assert_allclose(image, wanted / wanted.max(), atol=0.003)
            assert picture.get_title().startswith(f"#{id}: {int(digits.train.targets[id])}\n")
    assert len(pictured.figure(queries, train, max_queries=1).axes) == 5


def test_figure_without_a_dataset_names_the_neighbours(pictured, digits):
    figure = pictured.figure(digits.test.inputs[:3].view(3, 1, 8, 8), class_names=[f"digit {i}" for i in range(10)])
    assert f"#{int(pictured.neighbors.ids[0, 0])}: digit" in figure.axes[1].get_title()
    assert not figure.axes[1].get_images()


@pytest.mark.parametrize("name", ["$x_$", "a$\\frac{$", "[/b]"])
def test_names_of_classes_are_no_mathtext(pictured, digits, name):
    images = digits.test.inputs[:3].view(3, 1, 8, 8)
    figure = pictured.figure(images, class_names=[name] * 10)
    FigureCanvasAgg(figure).draw()  # what it cannot read as mathtext raises here
    for axes in figure.axes:
        assert name in axes.get_title()
        assert not axes.title.get_parse_math()


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        ((np.zeros((8, 6, 3), np.uint8), 1), (8, 6, 3)),
        ({"label": 1, "image": torch.rand(3, 8, 6)}, (8, 6, 3)),
        ([0, torch.rand(8, 6)], (8, 6)),
    ],
    ids=["array", "dict", "grey"],
)
def test_images_of_datasets(pictured, digits, item, shape):
    class Same:
        def __getitem__(self, id):
            return item

    figure = pictured.figure(digits.test.inputs[:3].view(3, 8, 8), Same())
    assert figure.axes[1].get_images()[0].get_array().shape == shape


def test_figure_without_images_says_so(pictured, digits):
    with pytest.raises(InputError, match=r"no images in the batch.*images="):
        pictured.figure()
    with pytest.raises(InputError, match=r"images of shape \(2, 8, 8\)"):
        pictured.figure(torch.zeros(2, 8, 8))
    with pytest.raises(InputError, match=r"dataset\[\d+\] is a tuple without an image"):
        pictured.figure(torch.zeros(3, 8, 8), [(torch.zeros(4), 1)] * 200)
    with pytest.raises(InputError, match=r"dataset is a list that has no row \d+"):
        pictured.figure(torch.zeros(3, 8, 8), [(torch.zeros(8, 8), 1)])
    with pytest.raises(InputError, match="max_queries=0"):
        pictured.figure(torch.zeros(3, 8, 8), max_queries=0)
    with pytest.raises(InputError, match=r"class_names has 1 names, and there is a class \d"):
        pictured.tables(["zero"])


def test_figure_without_matplotlib_names_the_extra(pictured, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "lightning_resmem.explanation.gallery", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"lightning-resmem\[plots\]"):
        pictured.figure(torch.zeros(3, 8, 8))
