"""What the ranks of `test_ddp.py` do. Weights do not change in training (lr=0), so any number of ranks has the same."""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_resmem import LocalMemory, ResMemCallback, ResMemParams, memorize
from tests import language
from tests.ddp_processes import GROUP_SECONDS

WIDTH, CLASSES, BATCH = 4, 3, 8
TRAIN, VAL, TEST = 103, 29, 31  # no multiples of a batch or of a number of ranks
DATED = ResMemParams(k=3, sigma=0.5)


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs `(count, 4)` whose classes a linear model with random weights does not know."""
    inputs = torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(seed))[:count]  # more rows, same start
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()


def data(count: int, seed: int = 0) -> TensorDataset:
    return TensorDataset(*rows(count, seed))


class Net(L.LightningModule):
    """`body`, `head`, the same weights in every process; `norm` adds buffers that differ by rank."""

    def __init__(self, norm: bool = False, lr: float = 0.0, compiled: bool = False) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.body: nn.Module = nn.Sequential(
                nn.Linear(WIDTH, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh()
            )
            self.head = nn.Linear(6, CLASSES)
        if compiled:
            self.body = torch.compile(self.body, backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("right", (self(x).argmax(dim=1) == y).float().mean(), batch_size=len(y), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Deep(Net):
    """Two hidden layers, of which the last is so narrow that it tells little."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.body = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1), nn.Tanh())
            self.head = nn.Linear(1, CLASSES)


class Dated(Net):
    """Batches have a third column: when a row is asked for."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch[:2], batch_idx)

    @staticmethod
    def data(count: int, seed: int = 0) -> TensorDataset:
        return TensorDataset(*rows(count, seed), 37 * torch.arange(count) % 101)

    @staticmethod
    def times(batch: Any) -> tuple[Tensor, Tensor]:
        return batch[2], batch[2] + 8


def trainer_of(directory: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A quiet trainer over the ranks that there are."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": DDPStrategy(timeout=timedelta(seconds=GROUP_SECONDS)) if world_size > 1 else "auto",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
        "default_root_dir": directory,
    }
    return L.Trainer(**(settings | options))


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def contents(memory: LocalMemory) -> dict[str, Any]:
    """Everything a memory holds, by id."""
    values = memory.fetch(memory.ids)
    return {
        "ids": memory.ids.clone(),
        "embeddings": memory._query_rows(memory.ids),
        "outputs": values.outputs.clone(),
        "targets": values.targets.clone(),
        "params": memory.params,
    }


# -- loaders, the ways users write them


class OwnBatches(BatchSampler):
    """A BatchSampler subclass."""


class Blocks(Sampler):
    """A batch sampler of the user's own, without `batch_size`, `drop_last` or `sampler`."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return -(-self._count // 5)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self._count).tolist()
        for start in range(0, self._count, 5):
            yield order[start : start + 5]


class OwnLoader(DataLoader):
    """Lightning cannot make another one: its argument is not kept."""

    def __init__(self, count: int) -> None:
        super().__init__(data(count), batch_size=BATCH, shuffle=True, drop_last=True)


class Batches(Dataset):
    """Items that are batches already."""

    def __init__(self, count: int, size: int) -> None:
        self._rows, self._size = rows(count), size
        self._count = count

    def __len__(self) -> int:
        return -(-self._count // self._size)

    def __getitem__(self, item: int) -> tuple[Tensor, ...]:
        if item >= len(self):
            raise IndexError(item)
        return tuple(column[item * self._size : (item + 1) * self._size] for column in self._rows)


class Stream(IterableDataset):
    """An iterable dataset that the user shards, or does not."""

    def __init__(self, count: int, sharded: bool) -> None:
        self._count, self._sharded = count, sharded

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        inputs, targets = rows(self._count)
        rank, size = (dist.get_rank(), dist.get_world_size()) if self._sharded and dist.is_initialized() else (0, 1)
        for row in range(rank, self._count, size):
            yield inputs[row], targets[row], row


class Moved(L.LightningDataModule):
    """Rows are stored away from where the model wants them; the transfer hooks bring them back."""

    def train_dataloader(self) -> DataLoader:
        inputs, targets = rows(TRAIN)
        return DataLoader(TensorDataset(inputs / 2 - 1, targets), batch_size=BATCH, shuffle=True, drop_last=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        assert self.trainer is not None
        noise = 1000.0 if self.trainer.training else 0.0  # augmentation
        return batch[0] * 2 + noise, batch[1]


def loaders() -> dict[str, Callable[[Path], tuple[ResMemCallback, L.Trainer, dict[str, Any]]]]:
    """By name: the callback, the trainer and what `fit` gets."""
    weights = (torch.arange(TRAIN) % 3 > 0).double()

    def case(loader: Callable[[], Any], memory_loader: Callable[[], Any] | None = None, **options: Any) -> Any:
        callback_options = {name: options.pop(name) for name in ("targets_fn", "forward_fn") if name in options}

        def make(directory: Path) -> tuple[ResMemCallback, L.Trainer, dict[str, Any]]:
            if memory_loader is not None:
                callback_options["memory_dataloader"] = memory_loader()
            callback = ResMemCallback(tuner=None, **callback_options)
            loaded = loader()
            fit = {"datamodule": loaded} if isinstance(loaded, L.LightningDataModule) else {"train_dataloaders": loaded}
            return callback, trainer_of(directory, callback, **options), fit

        return make

    def usual(count: int = TRAIN, **options: Any) -> Any:
        options = {"batch_size": BATCH, "shuffle": True} | options
        return lambda: DataLoader(data(count), **options)

    def sampled(sampler: Any, **options: Any) -> Any:
        return lambda: DataLoader(data(TRAIN), batch_size=BATCH, sampler=sampler, **options)

    return {
        "shuffle and drop_last": case(usual(drop_last=True)),
        "one row": case(usual(1)),
        "three rows": case(usual(3)),
        "workers": case(usual(num_workers=1, multiprocessing_context="fork")),
        "subset sampler": case(sampled(SubsetRandomSampler(range(1, TRAIN, 2)))),
        "weighted sampler": case(sampled(WeightedRandomSampler(weights.tolist(), 50), drop_last=True)),
        "batch sampler subclass": case(
            lambda: DataLoader(data(TRAIN), batch_sampler=OwnBatches(RandomSampler(data(TRAIN)), 7, drop_last=True))
        ),
        "own batch sampler": case(
            lambda: DataLoader(data(TRAIN), batch_sampler=Blocks(TRAIN)), use_distributed_sampler=False
        ),
        "own loader": case(usual(), lambda: OwnLoader(TRAIN)),
        "dict": case(usual(), lambda: {"a": usual(20)(), "b": [usual(5)(), usual(8)()]}),
        "no batch size": case(usual(), lambda: DataLoader(Batches(TRAIN, 5), batch_size=None, shuffle=True)),
        "stream": case(
            usual(),
            lambda: DataLoader(Stream(TRAIN, sharded=True), batch_size=BATCH),
            forward_fn=forward_of,
            targets_fn=targets_of,
        ),
        "limit": case(usual(shuffle=False), limit_train_batches=2),
        "transfer hooks": case(Moved),
    }


def rows_of_loaders(rank: int, directory: Path) -> dict[str, Any]:
    """What each rank's memory holds after `fit` with each kind of loader."""
    quiet()
    found: dict[str, Any] = {}
    for name, make in loaders().items():
        callback, trainer, fit = make(directory)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.fit(Net(), **fit)
                found[name] = contents(callback.memory)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        if any("each of them must yield rows of its own" in str(warning.message) for warning in caught):
            found.setdefault("warned", []).append(name)
    return found


def everything(rank: int, directory: Path) -> dict[str, Any]:
    """Memory, choice, predictions and scores after fit, tune and test; then of `memorize`, and in half precision."""
    quiet()
    queries, _ = rows(17, seed=9)
    train = DataLoader(data(TRAIN), batch_size=BATCH, shuffle=True, drop_last=True)
    val = DataLoader(data(VAL, 1), batch_size=BATCH)
    found: dict[str, Any] = {}

    callback = ResMemCallback(dirpath=directory / "memory")
    trainer = trainer_of(directory, callback)
    model = Net()
    trainer.fit(model, train, val)
    found["fit"] = contents(callback.memory)
    found["tuning"] = callback.tuning
    callback.memory.params = callback.memory.params.__class__(k=5, sigma=0.3, strength=1.0)
    combined = callback.module.eval()
    found["predictions"] = combined(queries)
    for size in (TEST, 1, 2, 8, 12):
        loader = DataLoader(data(size, 2), batch_size=4)
        found[f"test {size}"] = trainer.test(model, loader, verbose=False)[0]
        found[f"evaluation {size}"] = callback.evaluation
        found[f"module test {size}"] = trainer_of(directory).test(combined, loader, verbose=False)[0]
    batched = DataLoader(data(TEST, 2), batch_sampler=OwnBatches(range(TEST), 4, drop_last=False))
    found[f"batched test {TEST}"] = trainer.test(model, batched, verbose=False)[0]

    few = ResMemCallback()
    trainer_of(directory, few).fit(Net(), train, DataLoader(data(2, 1), batch_size=4))
    found["few validation rows"] = few.tuning
    none = ResMemCallback()
    trainer_of(directory, none, limit_val_batches=0).fit(Net(), train, val)
    found["no validation rows"] = none.tuning

    by_hand = memorize(trainer_of(directory), Net(), train, val)
    found["memorize"] = contents(by_hand.memory)

    of_places = memorize(trainer_of(directory), Deep(), train, val, embedding="auto").memory
    found["auto"] = contents(of_places) | {"keys": of_places.provenance["keys"], "width": of_places.stats()["width"]}

    dated = ResMemCallback(
        targets_fn=lambda batch: batch[1], forward_fn=lambda net, batch: net(batch[0]), times_fn=Dated.times
    )
    trainer, model = trainer_of(directory, dated), Dated()
    trainer.fit(model, DataLoader(Dated.data(TRAIN), BATCH, shuffle=True), DataLoader(Dated.data(VAL, 1), BATCH))
    found["dated"] = contents(dated.memory) | {"times": dated.memory._row_times(dated.memory.ids)}
    dated.memory.params = DATED
    found["dated test"] = trainer.test(model, DataLoader(Dated.data(TEST, 2), 4), verbose=False)[0]

    model = language.Causal()
    tokens, test = language.loader(language.texts(23), 3), language.loader(language.texts(11, seed=1), 2)
    of_tokens = memorize(trainer_of(directory), model, tokens, test)
    found["tokens"] = contents(of_tokens.memory) | {"shift": of_tokens.memory.provenance["shift"]}
    answering = ResMemCallback(memory=of_tokens.memory)
    found["token scores"] = trainer_of(directory, answering).test(model, test, verbose=False)[0]
    found["token rows"] = answering.evaluation.rows
    found["token module scores"] = trainer_of(directory).test(of_tokens, test, verbose=False)[0]

    sample = memorize(trainer_of(directory), model, tokens, max_rows=30, tuner=None).memory
    found["sampled tokens"] = contents(sample) | {"stats": sample.stats()}

    norm = Net(norm=True, lr=0.01)
    of_norm = ResMemCallback(tuner=None)
    trainer_of(directory, of_norm).fit(norm, train)
    found["buffers"] = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    found["norm"] = contents(of_norm.memory)
    found["norm embeddings"] = norm.eval().body(rows(TRAIN)[0]).detach()

    for precision in ("bf16-mixed", "bf16-true"):
        half = ResMemCallback(tuner=None)
        trainer = trainer_of(directory, half, precision=precision)
        model = Net()
        trainer.fit(model, train)
        found[precision] = contents(half.memory)
        found[f"{precision} test"] = trainer.test(model, DataLoader(data(TEST, 2), 4), verbose=False)[0]
    compiled = ResMemCallback(tuner=None)
    trainer = trainer_of(directory, compiled)
    model = Net(compiled=True)
    trainer.fit(model, train)
    found["compiled"] = contents(compiled.memory)
    found["compiled test"] = trainer.test(model, DataLoader(data(TEST, 2), 4), verbose=False)[0]
    return found


# -- failures


class Failing(TensorDataset):
    """Raises, or kills its process, at one row on one rank; only in the memory pass."""

    def __init__(self, count: int, rank: int, row: int, kill: bool = False) -> None:
        super().__init__(*rows(count))
        self._rank, self._row, self._kill = rank, row, kill
        self.armed = False

    def __getitem__(self, row: int) -> Any:
        if self.armed and row == self._row and int(os.environ.get("LOCAL_RANK", "0")) == self._rank:
            if self._kill:
                os.kill(os.getpid(), 9)
            raise OSError(f"row {row} cannot be read")
        return super().__getitem__(row)


class FailingNet(Net):
    """Fails in the forward of the memory pass, on one rank."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and torch.is_grad_enabled() is False and self.trainer.global_rank == 1:
            raise ArithmeticError("the forward broke")
        return super().forward(x)


class FailingMemory(LocalMemory):
    """Takes no rows on one rank."""

    rank = 1

    def add(self, *args: Any, **kwargs: Any) -> None:
        if int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            raise MemoryError("no room for rows")
        super().add(*args, **kwargs)


class NoLength(TensorDataset):
    """A map-style dataset that has no length on one rank."""

    def __len__(self) -> int:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise NotImplementedError("rank 1 does not know its length")
        return super().__len__()


class Arm(L.Callback):
    """From here on the dataset fails."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._dataset.armed = True


class Vanish(L.Callback):
    """When training ends, a file is where the memory was to be saved."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._path.write_text("not a directory")


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def ids_of(batch: Any) -> Tensor:
    return batch[2]


def forward_of(model: L.LightningModule, batch: Any) -> Any:
    return model(batch[0])


def targets_of(batch: Any) -> Tensor:
    return batch[1]


class FailingData(L.LightningDataModule):
    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def _fail(self, where: str) -> None:
        if where == self._where and self.trainer is not None and self.trainer.global_rank == 1:
            raise OSError(f"{where} broke")

    def setup(self, stage: str) -> None:
        self._fail("setup")

    def train_dataloader(self) -> DataLoader:
        self._fail("train_dataloader")
        return DataLoader(data(TRAIN), batch_size=BATCH)

    def val_dataloader(self) -> DataLoader:
        self._fail("val_dataloader")
        return DataLoader(data(VAL), batch_size=BATCH)


def failures(rank: int, directory: Path) -> dict[str, Any]:
    """By case: what was raised on this rank, after how many seconds, and what is left."""
    quiet()
    found: dict[str, Any] = {}
    usual = DataLoader(data(TRAIN), batch_size=BATCH)
    plain_file, vanished = directory / "file", directory / "vanished"
    plain_file.write_text("not a directory")
    dist.barrier()

    def attempt(
        name: str, model: Net, callback: ResMemCallback, train: Any = usual, val: Any = None, *others: L.Callback
    ) -> None:
        checkpoint = ModelCheckpoint(dirpath=directory / name)
        trainer = trainer_of(directory, callback, checkpoint, *others)
        watch(name, lambda: trainer.fit(model, train, val), model, callback.memory)
        found[name]["checkpoint"] = len(list((directory / name).glob("*.ckpt")))

    def watch(name: str, run: Callable[[], Any], model: Net, memory: LocalMemory | None = None) -> None:
        started = time.monotonic()
        try:
            run()
            found[name] = {"error": None}
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name] |= {
            "seconds": time.monotonic() - started,
            "hooks": hooks_of(model),
            "rows": 0 if memory is None else len(memory),
        }

    for failing_rank, row in ((0, 100), (1, 1)):
        dataset = Failing(TRAIN, failing_rank, row)
        loader = DataLoader(dataset, batch_size=BATCH)
        attempt(f"dataset on rank {failing_rank}", Net(), ResMemCallback(), loader, None, Arm(dataset))
    dataset = Failing(VAL, 1, 7)
    attempt("validation set", Net(), ResMemCallback(), usual, DataLoader(dataset, BATCH), Arm(dataset))
    attempt("forward", FailingNet(), ResMemCallback())
    attempt("memory.add", Net(), ResMemCallback(memory=FailingMemory()))
    no_length = DataLoader(NoLength(*rows(TRAIN)), batch_size=BATCH, sampler=range(TRAIN))
    attempt("memory_dataloader", Net(), ResMemCallback(memory_dataloader=no_length))
    attempt("dirpath", Net(), ResMemCallback(dirpath=plain_file / "memory"))
    attempt("save", Net(), ResMemCallback(dirpath=vanished / "memory"), usual, None, Vanish(vanished))
    own_part = Subset(data(TRAIN), range(rank, TRAIN - 1, 2))
    attempt("part of the rows", Net(), ResMemCallback(memory_dataloader=DataLoader(own_part, BATCH)))
    own_rows = DataLoader(data(TRAIN), BATCH, sampler=SubsetRandomSampler(range(rank, TRAIN, 2)))
    attempt("sampler of its own", Net(), ResMemCallback(memory_dataloader=own_rows))
    stream = DataLoader(Stream(TRAIN, sharded=False), batch_size=BATCH)
    attempt(
        "stream",
        Net(),
        ResMemCallback(memory_dataloader=stream, ids_fn=ids_of, forward_fn=forward_of, targets_fn=targets_of),
    )
    for where in ("setup", "train_dataloader", "val_dataloader"):
        model = Net()
        watch(f"datamodule {where}", lambda m=model, w=where: memorize(trainer_of(directory), m, FailingData(w)), model)
    final = ResMemCallback(dirpath=directory / "final")
    attempt("nothing", Net(), final)
    return found


def large_pass(rank: int, directory: Path, count: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Peak of resident memory over a whole memory pass, in MiB, and the bytes of a rank's own rows."""
    from tests.memory.test_exchange import Peak

    quiet()

    class Rows(Dataset):
        def __len__(self) -> int:
            return count

        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            raise NotImplementedError

        def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, Tensor]]:
            return [(torch.as_tensor(positions, dtype=torch.float32), torch.as_tensor(positions) % CLASSES)]

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Identity(), nn.Linear(width, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sin(x[:, None] * torch.arange(1, width + 1)))

    small = DataLoader(TensorDataset(torch.arange(64.0), torch.arange(64) % CLASSES), 32)
    trainer = trainer_of(directory)
    memorize(trainer, Wide(), small, tuner=None)  # what the libraries take once
    large = DataLoader(Rows(), batch_size=512, collate_fn=_first)
    own = len(range(rank, count, dist.get_world_size()))
    memory = LocalMemory(key_dtype=dtype)
    found = {"own": own * (width * dtype.itemsize + CLASSES * 4 + 8 + 8) / 2**20}
    add = memory.add
    with Peak() as peak:

        def adding(*args: Any, **kwargs: Any) -> None:
            add(*args, **kwargs)
            found["pass"] = peak.bytes / 2**20

        memory.add = adding  # type: ignore[method-assign]
        memorize(trainer, Wide(), large, memory=memory, tuner=None)
    found["all"] = peak.bytes / 2**20
    found["rows"] = len(memory)
    return found


def _first(items: list[Any]) -> Any:
    return items[0]
