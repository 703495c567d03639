"""A user's script on two ranks with a RayMemory, for `test_ray_ranks.py`. Run as `python ray_ranks.py MODE DIRECTORY`.

Modes: `fit` trains, tests and memorizes; `fail` has rank 1 fail in the memory pass; `hosts` pretends that the ranks are
on two machines without a cluster; `room` asks for more than there is.
"""

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_resmem import GridTuner, LocalMemory, RayMemory, ResMemCallback, memorize
from tests.ddp_scenarios import BATCH, TEST, TRAIN, VAL, Arm, Failing, Net, data, quiet, rows, trainer_of
from tests.ddp_script import strategy_of

SECONDS = 120.0


def main(mode: str, directory: Path) -> None:
    quiet()
    logging.getLogger("lightning_resmem").setLevel(logging.ERROR)
    storage = directory / "shards"
    memory = RayMemory(2, storage_path=storage, request_timeout_s=SECONDS)
    callback = ResMemCallback(memory=memory, tuner=GridTuner(k=[3, 9], sigma=[0.5, 1.0]))
    callbacks: list[Any] = [callback, ModelCheckpoint(directory / "checkpoints")]
    dataset: Any = data(TRAIN)
    if mode == "fail":
        dataset = Failing(TRAIN, 1, 51)
        callbacks.append(Arm(dataset))
    if mode == "room":
        callbacks[0] = ResMemCallback(memory=RayMemory(2, cpus_per_shard=1000, request_timeout_s=3.0))
    trainer = trainer_of(directory, *callbacks, strategy=strategy_of("ddp_patient"), devices=2)
    if mode == "hosts":
        socket.gethostname = lambda: f"machine{trainer.global_rank}"
    model, queries = Net(), rows(17, seed=9)[0]
    trainer.fit(model, DataLoader(dataset, batch_size=BATCH, shuffle=True), DataLoader(data(VAL, 1), batch_size=BATCH))
    found: dict[str, Any] = {}

    def look(stage: str, combined: Any) -> None:
        memory = combined.memory
        found[stage] = {
            "kind": type(memory).__name__,
            "ids": memory.ids.tolist(),
            "params": str(memory.params),
            "predictions": combined.eval()(queries).tolist(),
            "shards": [shard["rows"] for shard in memory.stats().get("shards", [])],
        }

    look("fit", callback.module)
    found["test"] = trainer.test(model, DataLoader(data(TEST, 2), batch_size=4), verbose=False)[0]
    # A second pass fills the same shards again.
    again = memorize(
        trainer_of(directory, strategy=strategy_of("ddp_patient"), devices=2),
        model,
        DataLoader(dataset, batch_size=BATCH),
        memory=memory,
        tuner=None,
    )
    look("again", again)
    one = memorize(
        trainer_of(directory, strategy=strategy_of("ddp_patient"), devices=2),
        model,
        DataLoader(dataset, batch_size=BATCH),
        DataLoader(data(VAL, 1), batch_size=BATCH),
        memory=LocalMemory(),
        tuner=GridTuner(k=[3, 9], sigma=[0.5, 1.0]),
    )
    look("local", one)
    (directory / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
