"""Every row of a loader exactly once over all ranks, whatever the loader does; and what is refused."""

import random
import tracemalloc

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_resmem import memorize
from lightning_resmem.collection.loaders import plan
from lightning_resmem.collection.samplers import num_unpadded_rows, training_positions
from lightning_resmem.errors import InputError


class Positions(Dataset):
    """Row `i` is the number `i` (plus a start)."""

    def __init__(self, size, start=0):
        self.size, self.start = size, start

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert type(index) is int
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.start + index


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        return iter(range(self.size))


def read(parts):
    """`(id, row)` of all rows, read and counted as the memory pass does."""
    found = []
    for part in parts:
        first = 0
        for index, batch in enumerate(part.batches):
            rows = [int(row) for row in batch]
            ids = part.ids(index, first, len(rows))
            assert ids.dtype == torch.int64
            found += zip(ids.tolist(), rows, strict=True)
            first += len(rows)
        assert part.num_rows is None or part.num_rows == first
    return found


def read_on_all_ranks(loaders, world_size=1, **options):
    return [row for rank in range(world_size) for row in read(plan(loaders, len, rank, world_size, **options))]


def each_once(rows):
    """Pairs of id and row, for rows that are their own position."""
    return [(row, row) for row in rows]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", range(14))
def test_every_row_is_read_once_over_all_ranks(size, world_size):
    for batch_size in range(1, 6):
        loader = DataLoader(Positions(size), batch_size=batch_size, shuffle=size > 0, drop_last=True)
        assert training_positions(loader) == range(size)
        parts = [plan(loader, len, rank, world_size)[0] for rank in range(world_size)]
        found = [read([part]) for part in parts]
        assert sorted(row for rows in found for row in rows) == each_once(range(size))
        for rank, (part, rows) in enumerate(zip(parts, found, strict=True)):
            assert rows == each_once(range(rank, size, world_size))
            assert part.num_batches == len(list(part.batches))
            assert max([len(batch) for batch in part.batches], default=0) <= batch_size
            assert (part.sample is None) == (not rows)
            assert part.sample is None or len(next(iter(part.sample))) == min(2, batch_size, len(rows))


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 2)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("drops", [False, True])
def test_the_memory_pass_notices_rows_that_collate_fn_drops(drops):
    def collate(rows):
        kept = [row for row in rows if not drops or row != 5]
        return torch.tensor(kept, dtype=torch.float32)[:, None], torch.tensor(kept) % 2

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    loader = DataLoader(Positions(9), batch_size=4, shuffle=True, drop_last=True, collate_fn=collate)
    if drops:
        with pytest.raises(InputError, match=r"yielded 8 rows for 9 positions.*memory_dataloader="):
            memorize(trainer, Net(), loader)
    else:
        assert memorize(trainer, Net(), loader).memory.ids.tolist() == list(range(9))


def start_at_100(_):
    torch.utils.data.get_worker_info().dataset.start = 100


def test_workers_are_prepared_as_the_users_are():
    loader = DataLoader(Positions(3), batch_size=2, num_workers=1, worker_init_fn=start_at_100)
    assert read(plan(loader, len)) == [(0, 100), (1, 101), (2, 102)]


# -- samplers


def wrapped(sampler, rank=0, kind=DistributedSamplerWrapper):
    return kind(sampler, num_replicas=2, rank=rank, shuffle=False)


ROWS_OF_12 = {
    "sequential": (SequentialSampler(range(12)), range(12)),
    "sequential, of the first rows": (SequentialSampler(range(5)), range(5)),
    "random": (RandomSampler(range(12)), range(12)),
    "random, of the first rows": (RandomSampler(range(5)), range(5)),
    "random with replacement": (RandomSampler(range(12), replacement=True, num_samples=40), range(12)),
    "random, few": (RandomSampler(range(12), num_samples=2), range(12)),
    "subset": (SubsetRandomSampler([7, 1, 4]), [1, 4, 7]),
    "subset, repeated": (SubsetRandomSampler([7, 1, 7, 4]), [1, 4, 7]),
    "subset, array": (SubsetRandomSampler(np.array([7, 1, 4])), [1, 4, 7]),
    "subset, tensor": (SubsetRandomSampler(torch.tensor([7, 1, 4])), [1, 4, 7]),
    "subset, empty": (SubsetRandomSampler([]), []),
    "subset, everything": (SubsetRandomSampler(list(range(12))[::-1]), range(12)),
    "weighted": (WeightedRandomSampler([1.0, 0.0, 2.0, 0.0], 10), [0, 2]),
    "weighted, tensor": (WeightedRandomSampler(torch.arange(12.0), 3), range(1, 12)),
    "list": ([5, 3, 3], [3, 5]),
    "array": (np.array([5, 3]), [3, 5]),
    "range": (range(3, 6), [3, 4, 5]),
    "distributed": (DistributedSampler(Positions(12), num_replicas=5, rank=4), range(12)),
    "distributed, drop_last": (DistributedSampler(Positions(12), num_replicas=5, rank=0, drop_last=True), range(12)),
    "unrepeated": (UnrepeatedDistributedSampler(Positions(12), num_replicas=5, rank=1), range(12)),
    "wrapped subset": (wrapped(SubsetRandomSampler([7, 1, 4]), rank=1), [1, 4, 7]),
    "wrapped subset, unrepeated": (
        wrapped(SubsetRandomSampler([7, 1, 4]), kind=UnrepeatedDistributedSamplerWrapper),
        [1, 4, 7],
    ),
    "wrapped weighted": (wrapped(WeightedRandomSampler([0.0, 1.0, 1.0], 6)), [1, 2]),
}


@pytest.mark.parametrize(("sampler", "rows"), ROWS_OF_12.values(), ids=ROWS_OF_12)
@pytest.mark.parametrize("place", ["sampler", "batch_sampler"])
def test_rows_of_known_samplers(sampler, rows, place):
    options = {"sampler": sampler, "batch_size": 2, "drop_last": True}
    if place == "batch_sampler":
        options = {"batch_sampler": BatchSampler(sampler, 2, drop_last=True)}
    loader = DataLoader(Positions(12), **options)
    assert list(training_positions(loader)) == list(rows)
    assert sorted(read_on_all_ranks(loader, world_size=3)) == each_once(rows)


def test_a_subset_of_the_dataset_has_positions_in_the_subset():
    loader = DataLoader(Subset(Positions(10), [9, 2, 5]), batch_size=2, shuffle=True)
    assert read_on_all_ranks(loader) == [(0, 9), (1, 2), (2, 5)]


class Shuffled(Sampler):
    """A user's own: everything, in an order from a generator of its own."""

    def __init__(self, size, seed=0):
        self.size, self.generator = size, torch.Generator().manual_seed(seed)

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=self.generator).tolist())


class ShuffledTensors(Shuffled):
    def __iter__(self):
        return iter(torch.randperm(self.size, generator=self.generator))


class ThreeTimes(Shuffled):
    def __iter__(self):
        return (row for row in range(self.size) for _ in range(3))


class Endless(Shuffled):
    def __iter__(self):
        while True:
            yield from super().__iter__()


class HalfOfEachEpoch(Shuffled):
    """Even rows in even epochs, odd ones in the others."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(self.epoch % 2, self.size, 2))


class Buckets:
    """Batches of rows of similar length; has none of BatchSampler's attributes."""

    def __init__(self, size, width, drop, seed=0):
        self.size, self.width, self.drop = size, width, drop
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        half = self.size // 2
        for rows in (range(half), range(half, self.size)):
            shuffled = torch.tensor(list(rows))[torch.randperm(len(rows), generator=self.generator)]
            for batch in shuffled.split(self.width):
                if len(batch) == self.width or not self.drop:
                    yield batch.tolist()

    def __len__(self):
        return self.size // self.width


class Grouped(BatchSampler):
    """A BatchSampler subclass with an argument more."""

    def __init__(self, sampler, batch_size, drop_last, groups):
        super().__init__(sampler, batch_size, drop_last)
        self.groups = groups

    def __iter__(self):
        for batch in super().__iter__():
            yield sorted(batch)


@pytest.mark.parametrize(
    "sampler",
    [Shuffled(30), ShuffledTensors(30), ThreeTimes(30), Endless(30), HalfOfEachEpoch(30)],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_custom_samplers_that_draw_everything(sampler, drop_last):
    loader = DataLoader(Positions(30), batch_size=4, sampler=sampler, drop_last=drop_last)
    assert sorted(read_on_all_ranks(loader, 2)) == each_once(range(30))


@pytest.mark.parametrize("drop", [False, True])
def test_custom_batch_samplers_that_draw_everything(drop):
    loader = DataLoader(Positions(31), batch_sampler=Buckets(31, 4, drop))
    assert sorted(read_on_all_ranks(loader, 2)) == each_once(range(31))


@pytest.mark.parametrize(
    ("sampler", "rows"),
    [
        (RandomSampler(range(9)), range(9)),
        (SubsetRandomSampler([8, 0, 3]), [0, 3, 8]),
        (DistributedSampler(Positions(9), num_replicas=2, rank=1), range(9)),
        (wrapped(SubsetRandomSampler([8, 0, 3])), [0, 3, 8]),
    ],
)
def test_rows_of_a_batch_sampler_subclass_are_those_of_its_sampler(sampler, rows):
    loader = DataLoader(Positions(9), batch_sampler=Grouped(sampler, 2, True, groups=3))
    (part,) = plan(loader, len)
    assert sorted(read([part])) == each_once(rows)
    assert len(next(iter(part.batches))) == 2


class Half(Shuffled):
    def __iter__(self):
        return iter(range(self.size // 2))


class EndlessHalf(Half):
    def __iter__(self):
        while True:
            yield from super().__iter__()


class NotAll(SubsetRandomSampler):
    """Keeps the name of a known sampler, but draws something else."""

    def __iter__(self):
        return iter([0])


class OwnShare(DistributedSampler):
    def __iter__(self):
        return iter([0])


class HalfTheBuckets(Buckets):
    def __iter__(self):
        return iter([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": Half(10)},
        {"sampler": Half(10), "batch_size": 32},
        {"sampler": EndlessHalf(10)},
        {"sampler": NotAll([0, 1])},
        {"sampler": OwnShare(Positions(10), num_replicas=1, rank=0)},
        {"sampler": wrapped(Half(10))},
        {"batch_sampler": HalfTheBuckets(10, 2, False)},
    ],
    ids=lambda options: " ".join(type(value).__name__ for value in options.values()),
)
def test_samplers_that_draw_a_part_are_refused(options):
    with pytest.raises(InputError, match=r"draws \d of the dataset's 10 rows.*memory_dataloader=DataLoader"):
        training_positions(DataLoader(Positions(10), **options))


class Yields(Shuffled):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("item", ["a", None, (0, 1), [0], 1.5, 10, {}], ids=str)
def test_samplers_that_yield_something_else_than_positions_are_refused(item):
    with pytest.raises(InputError, match=r"draws cannot be told.*memory_dataloader="):
        training_positions(DataLoader(Positions(10), sampler=Yields(item)))


@pytest.mark.parametrize("item", [0, [(0, 1), (2, 3)], ["a"], [10]], ids=str)
def test_batch_samplers_that_yield_something_else_than_lists_of_positions_are_refused(item):
    with pytest.raises(InputError, match=r"draws cannot be told.*memory_dataloader="):
        training_positions(DataLoader(Positions(10), batch_sampler=Yields(item)))


def test_a_sampler_that_cannot_be_copied_is_refused():
    sampler = Shuffled(10)
    sampler.open_generator = (i for i in range(10))
    with pytest.raises(InputError, match=r"Shuffled draws cannot be told \(cannot pickle 'generator' object\)"):
        training_positions(DataLoader(Positions(10), sampler=sampler))


def test_looking_at_a_sampler_neither_changes_nor_copies_what_it_holds():
    class CopyIsAnError(Positions):
        def __deepcopy__(self, memo):
            raise AssertionError("the dataset may be large")

    dataset = CopyIsAnError(10)
    sampler = Shuffled(10)
    sampler.dataset = dataset
    expected = list(Shuffled(10))
    training_positions(DataLoader(dataset, sampler=sampler))
    assert list(sampler) == expected


def numpy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002


class DrawsFromAllGenerators(Shuffled):
    def __iter__(self):
        random.random()
        np.random.rand()  # noqa: NPY002
        return iter(torch.randperm(self.size).tolist())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Positions(10), sampler=DrawsFromAllGenerators(10)),
        DataLoader(Positions(10), batch_size=4, shuffle=True),
        DataLoader([torch.rand(3) for _ in range(3)], batch_size=None, shuffle=True),
    ],
)
def test_planning_leaves_all_random_states_alone(loader):
    before = torch.get_rng_state(), random.getstate(), numpy_state()
    plan(loader, len)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy_state() == before[2]


# -- loaders


class Configured(DataLoader):
    """Has constructor arguments that it does not keep."""

    def __init__(self, data, extra, **kwargs):
        super().__init__(data, **kwargs)
        self.doubled = 2 * extra


def test_dataloader_subclass_with_arguments_of_its_own():
    loader = Configured(Positions(7), 3, batch_size=2, shuffle=True, collate_fn=lambda rows: torch.tensor(rows) + 100)
    assert read_on_all_ranks(loader) == [(i, i + 100) for i in range(7)]


def test_dataloader_subclass_with_its_own_iter_is_refused():
    class Prefetching(DataLoader):
        def __iter__(self):
            yield from super().__iter__()

    with pytest.raises(InputError, match=r"Prefetching has an __iter__ of its own.*memory_dataloader="):
        plan(Prefetching(Positions(3)), len)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("rows_per_item", [1, 3])
@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_items_that_are_batches(size, rows_per_item, last, world_size):
    starts = range(0, size * rows_per_item, rows_per_item)
    items = [torch.arange(start, start + rows_per_item) for start in starts]
    items[-1] = items[-1][:last]
    loader = DataLoader(items, batch_size=None, shuffle=True)
    rows = (size - 1) * rows_per_item + min(last, rows_per_item)
    assert sorted(read_on_all_ranks(loader, world_size)) == each_once(range(rows))
    assert len(read_on_all_ranks(loader, limit_batches=1)) == rows_per_item


def test_some_items_that_are_batches():
    items = list(torch.arange(12).split(3))
    loader = DataLoader(items, batch_size=None, sampler=SubsetRandomSampler([2, 0]))
    assert read_on_all_ranks(loader) == each_once([0, 1, 2, 6, 7, 8])


def test_no_items_that_are_batches():
    assert read_on_all_ranks(DataLoader([], batch_size=None)) == []


@pytest.mark.parametrize("sizes", [(2, 3, 2), (3, 2, 3), (2, 2, 3)])
def test_items_of_uneven_size_are_refused(sizes):
    loader = DataLoader(list(torch.arange(sum(sizes)).split(sizes)), batch_size=None)
    with pytest.raises(InputError, match=r"item 1|item 2.*memory_dataloader="):
        read_on_all_ranks(loader)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_iterable_dataset(batch_size, drop_last):
    loader = DataLoader(Stream(8), batch_size=batch_size, drop_last=drop_last)
    assert read_on_all_ranks(loader) == each_once(range(8))
    assert len(read_on_all_ranks(loader, limit_batches=1)) == batch_size


def test_iterables_without_positions_count_their_rows_apart_on_each_rank():
    shares = [range(0, 5), range(5, 12)]
    found = [
        read(plan(DataLoader(list_stream(share), batch_size=2), len, rank, 2)) for rank, share in enumerate(shares)
    ]
    ids = [i for rows in found for i, _ in rows]
    assert len(set(ids)) == len(ids) == 12
    assert [row for rows in found for _, row in rows] == list(range(12))


def list_stream(rows):
    stream = Stream(len(rows))
    stream.__class__ = type("ListStream", (Stream,), {"__iter__": lambda self: iter(rows)})
    return stream


def test_any_iterable_of_batches():
    class Batches:
        def __iter__(self):
            return iter(torch.arange(7).split(3))

    (part,) = plan(Batches(), len)
    assert read([part]) == read([part]) == each_once(range(7))
    assert part.sample is None  # reading it may use a row up
    assert read_on_all_ranks(Batches(), limit_batches=2) == each_once(range(6))


def test_a_generator_is_not_read_by_planning():
    generator = (batch for batch in torch.arange(7).split(3))
    assert read(plan(generator, len, limit_batches=5)) == each_once(range(7))


@pytest.mark.parametrize("world_size", [1, 3])
def test_several_loaders_have_ids_one_after_the_other(world_size):
    first, second = DataLoader(Positions(5), batch_size=2), DataLoader(Positions(4, start=5), shuffle=True)
    items = DataLoader(list(torch.arange(9, 15).split(2)), batch_size=None)
    last = DataLoader(Positions(2, start=15))
    for loaders in (
        [first, second, items, last],
        {"a": first, "b": {"c": second, "d": items}, "e": last},
        CombinedLoader([first, second, items, last], "max_size_cycle"),
        [first, None, second, items, last],
    ):
        assert sorted(read_on_all_ranks(loaders, world_size)) == each_once(range(17))


def test_ids_count_the_whole_dataset_of_a_loader_that_trains_on_a_part():
    loaders = [DataLoader(Positions(5), sampler=[3]), DataLoader(Positions(2, start=5))]
    assert read_on_all_ranks(loaders) == each_once([3, 5, 6])


@pytest.mark.parametrize("loaders", [[], None, {}, [None]])
def test_no_loader_is_refused(loaders):
    with pytest.raises(InputError, match=r"no loader.*memory_dataloader="):
        plan(loaders, len)


def test_a_loader_without_positions_beside_another_is_refused():
    with pytest.raises(InputError, match=r"has no positions.*memory_dataloader="):
        plan([DataLoader(Positions(2)), DataLoader(Stream(2))], len)


def test_a_dataset_without_length_is_refused():
    class Unsized:
        def __getitem__(self, index):
            return index

    loader = DataLoader(Unsized(), sampler=Shuffled(3))
    with pytest.raises(InputError, match=r"Unsized has no length.*memory_dataloader="):
        plan(loader, len)


def test_worker_processes():
    loader = DataLoader(Positions(11), batch_size=2, shuffle=True, num_workers=2, persistent_workers=True, timeout=60)
    (part,) = plan(loader, len)
    assert part.batches.num_workers == 2
    assert part.batches.timeout == 60
    assert part.sample.num_workers == 0
    assert read([part]) == each_once(range(11))


def test_collating_is_kept_and_dropped_or_repeated_rows_are_noticed():
    dropping = DataLoader(Positions(6), batch_size=2, collate_fn=lambda rows: [row for row in rows if row != 3])
    (part,) = plan(dropping, len)
    assert part.num_rows == 6 > sum(len(batch) for batch in part.batches)  # what the pass compares
    repeating = DataLoader(Positions(6), batch_size=2, collate_fn=lambda rows: rows + rows)
    with pytest.raises(InputError, match=r"more rows than it has positions.*collate_fn.*memory_dataloader="):
        read_on_all_ranks(repeating)


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_limit_is_in_batches_of_each_rank(limit):
    loader = DataLoader(Positions(10), batch_size=2, shuffle=True)
    for rank in range(2):
        (part,) = plan(loader, len, rank, 2, limit_batches=limit)
        assert part.num_batches == min(limit, 3)
        assert read([part]) == each_once(list(range(rank, 10, 2))[: 2 * limit])


@pytest.mark.parametrize("batch_size", [None, 0, "auto"])
def test_a_batch_sampler_with_a_strange_batch_size(batch_size):
    sampler = Buckets(200, 4, False)
    sampler.batch_size = batch_size
    (part,) = plan(DataLoader(Positions(200), batch_sampler=sampler), len)
    assert part.num_batches == len(list(part.batches)) == 50
    assert sorted(read([part])) == each_once(range(200))


def test_planning_ten_million_rows_takes_little_memory():
    loader = DataLoader(Positions(10_000_000), batch_size=1000, shuffle=True)
    tracemalloc.start()
    try:
        (part,) = plan(loader, len, rank=1, world_size=2)
        ids = part.ids(0, 4_000_000, 3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.tolist() == [8_000_001, 8_000_003, 8_000_005]
    assert part.num_rows == 5_000_000
    assert peak < 1_000_000


# -- padding of evaluation loaders


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("shuffle", [False, True])
def test_padding_is_what_the_distributed_sampler_repeats(world_size, shuffle):
    for size in range(1, 14):
        dataset, kept = Positions(size), []
        for rank in range(world_size):
            sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle)
            count = num_unpadded_rows(DataLoader(dataset, sampler=sampler))
            assert 0 <= count <= len(sampler)
            assert num_unpadded_rows(DataLoader(dataset, batch_sampler=Grouped(sampler, 2, False, 1))) == count
            kept += list(sampler)[:count]
        assert sorted(kept) == list(range(size))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Positions(5), batch_size=2),
        DataLoader(Positions(5), sampler=DistributedSampler(Positions(5), 2, 0, drop_last=True)),
        DataLoader(Stream(5)),
        [torch.zeros(2)],
    ],
)
def test_loaders_without_padding(loader):
    assert num_unpadded_rows(loader) is None


def test_padding_of_a_wrapped_sampler():
    samplers = [wrapped(SubsetRandomSampler([1, 2, 3]), rank) for rank in range(2)]
    counts = [num_unpadded_rows(DataLoader(Positions(9), sampler=sampler)) for sampler in samplers]
    assert counts == [2, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "options", [{"shuffle": True}, {"sampler": SubsetRandomSampler([6, 0, 3])}], ids=["all", "some"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batches_of_tensors_are_those_of_the_loader(num_workers, options, batch_size):
    """Values, types and shapes as the user's own loader would yield them for the same rows."""
    dataset = TensorDataset(torch.rand(7, 3), torch.arange(7))
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, **options)
    for rank in range(2):
        (part,) = plan(loader, lambda batch: len(batch[1]), rank, 2)
        rows = list(training_positions(loader))[rank::2]
        found = list(part.batches)
        expected = list(DataLoader(dataset, batch_size=batch_size, sampler=rows))
        assert part.num_batches == len(found) == len(expected)
        assert torch.cat([batch[1] for batch in found]).tolist() == part.ids(0, 0, len(rows)).tolist() == rows
        for batch, wanted in zip(found, expected, strict=True):
            assert type(batch) is type(wanted)
            assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))
