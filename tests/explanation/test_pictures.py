"""Pictures of rows: found where there are any, shown as they are."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_resmem.explanation.pictures import find_images, find_picture
from lightning_resmem.reporting.pictures import row_lookup

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOR = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ((torch.from_numpy(GREY), 3), GREY),
        ((torch.from_numpy(GREY)[None], 3), GREY),
        ((torch.from_numpy(COLOR).movedim(2, 0), 3), COLOR),
        ({"label": 3, "pixels": COLOR}, COLOR),
        ((np.dstack([COLOR, GREY]), 3), COLOR),  # with transparency
        ((Image.fromarray(COLOR), 3), COLOR),
        ((Image.fromarray(GREY), 3), GREY),
        ((Image.fromarray(GREY).convert("P"), 3), np.dstack([GREY] * 3)),
        (("words", GREY), GREY),
    ],
)
def test_images_of_every_kind(row, wanted):
    found = find_picture(row)
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted)


def test_normalised_inputs_are_stretched():
    found = find_picture((torch.linspace(-2, 3, 64).reshape(1, 8, 8), 0))
    assert (found.min(), found.max()) == (0, 255)
    assert np.array_equal(found.ravel(), np.linspace(0, 255, 64).round())
    assert find_picture((torch.full((1, 8, 8), 7.0), 0)).max() == 0
    assert find_picture((torch.full((8, 8), torch.nan), 0)).shape == (8, 8)
    assert find_picture((torch.rand(3, 8, 8).bfloat16(), 0)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "row",
    [
        (torch.rand(64), 3),
        (torch.rand(2, 4), 3),
        (torch.rand(5, 8, 8), 3),
        (torch.rand(3, 8, 8, 8), 3),
        "words",
        3,
        ({"nested": GREY}, 3),
        (np.array([["a"] * 8] * 8), 3),
    ],
)
def test_no_images(row):
    assert find_picture(row) is None


class Stream(IterableDataset):
    def __iter__(self):
        yield GREY


def dataset(first):
    return TensorDataset(torch.arange(first, first + 3)[:, None, None].expand(3, 8, 8).to(torch.uint8))


def test_ids_go_on_over_several_loaders():
    look_up = row_lookup([DataLoader(dataset(10)), DataLoader(dataset(20), shuffle=True)])
    assert [int(look_up(position).max()) for position in range(6)] == [10, 11, 12, 20, 21, 22]


@pytest.mark.parametrize(
    "loaders", [None, [], DataLoader(Stream()), [[torch.rand(2, 8, 8)]], DataLoader(dataset(0), batch_size=None)]
)
def test_no_positions_no_pictures(loaders):
    assert row_lookup(loaders)(0) is None


def test_random_augmentation_leaves_the_generators_alone():
    class Augmented(TensorDataset):
        def __getitem__(self, position):
            return torch.rand(8, 8)

    look_up = row_lookup(DataLoader(Augmented(torch.rand(3))))
    before = torch.get_rng_state()
    assert look_up(1) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), (2, 3, 8, 8)),
        ({"pixel_values": torch.zeros(2, 8, 8), "labels": torch.zeros(2)}, (2, 8, 8)),
        (torch.zeros(2, 1, 8, 8), (2, 1, 8, 8)),
        ((torch.zeros(2, 64), torch.zeros(2)), None),
        ((torch.zeros(2, 16, 8, 8), torch.zeros(2)), None),
    ],
)
def test_images_of_a_batch(batch, shape):
    found = find_images(batch)
    assert shape == (None if found is None else tuple(found.shape))
