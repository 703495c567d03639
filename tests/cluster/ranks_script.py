"""A user's script on two ranks with a RayMemory, for `test_ranks.py`. Run as `python ranks_script.py MODE DIRECTORY`.

Modes: `fit` trains, tests and memorizes; `fail` has rank 1 fail in the memory pass; `hosts` pretends that the ranks are
on two machines without a cluster; `room` asks for more than there is.
"""

import json
import logging
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_resmem import GridTuner, LocalMemory, RayMemory, ResMemCallback, memorize
from tests.ddp_scenarios import BATCH, TEST, TRAIN, VAL, Arm, Failing, Net, data, quiet, rows, trainer_of

SECONDS = 120.0


def main(mode: str, directory: Path) -> None:
    quiet()
    logging.getLogger("lightning_resmem").setLevel(logging.ERROR)

    def trainer_with(*callbacks: Any) -> Trainer:
        # Starting a Ray takes longer than such tests wait otherwise.
        return trainer_of(directory, *callbacks, strategy=DDPStrategy(timeout=timedelta(seconds=SECONDS)), devices=2)

    # Two pools find room where a Ray of as many CPUs as this machine has is started.
    options: dict[str, Any] = {
        "storage_path": directory / "shards",
        "request_timeout_s": SECONDS,
        "cpus_per_shard": 0.5,
    }
    if mode == "room":
        options |= {"gpus_per_shard": 1000, "request_timeout_s": 3.0}
    memory, tuner = RayMemory(2, **options), GridTuner(k=[3, 9], sigma=[0.5, 1.0])
    callback = ResMemCallback(memory=memory, tuner=tuner)
    callbacks: list[Any] = [callback, ModelCheckpoint(directory / "checkpoints")]
    dataset: Any = data(TRAIN)
    if mode == "fail":
        dataset = Failing(TRAIN, 1, 51)
        callbacks.append(Arm(dataset))
    trainer = trainer_with(*callbacks)
    if mode == "hosts":
        socket.gethostname = lambda: f"machine{trainer.global_rank}"
    model, queries = Net(), rows(17, seed=9)[0]
    loader, val_loader = DataLoader(dataset, BATCH, shuffle=True), DataLoader(data(VAL, 1), BATCH)
    trainer.fit(model, loader, val_loader)
    found: dict[str, Any] = {}

    def look(stage: str, combined: Any) -> None:
        found[stage] = {
            "kind": type(combined.memory).__name__,
            "ids": combined.memory.ids.tolist(),
            "params": str(combined.memory.params),
            "predictions": combined.eval()(queries).tolist(),
            "shards": [shard["rows"] for shard in combined.memory.stats().get("shards", [])],
        }

    look("fit", callback.module)
    found["test"] = trainer.test(model, DataLoader(data(TEST, 2), batch_size=4), verbose=False)[0]
    fresh = ResMemCallback(memory=RayMemory(2, **options))
    fresh.load_state_dict(callback.state_dict())
    found["restored test"] = trainer_with(fresh).test(model, DataLoader(data(TEST, 2), batch_size=4), verbose=False)[0]
    look("restored", fresh.module)
    look("again", memorize(trainer_with(), model, loader, val_loader, memory=memory, tuner=tuner))  # the same shards
    look("local", memorize(trainer_with(), model, loader, val_loader, memory=LocalMemory(), tuner=tuner))
    (directory / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
