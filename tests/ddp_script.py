"""A user's script, for `test_ddp.py`: train with a strategy, test, memorize, and write down what each process saw.

Run as `python ddp_script.py STRATEGY MODE DIRECTORY`.
"""

import json
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lightning_resmem import ResMemCallback, memorize
from tests.ddp_processes import GROUP_SECONDS
from tests.ddp_scenarios import BATCH, TEST, TRAIN, VAL, Arm, Failing, Net, data, quiet, rows, trainer_of

START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_forkserver": "forkserver", "ddp_fork": "fork"}


def strategy_of(name: str) -> Any:
    if name not in START_METHODS:
        return name
    return DDPStrategy(start_method=START_METHODS[name], timeout=timedelta(seconds=GROUP_SECONDS))  # type: ignore[arg-type]


def main(name: str, mode: str, directory: Path) -> None:
    quiet()

    def trainer_with(*callbacks: Any) -> Trainer:
        return trainer_of(directory, *callbacks, strategy=strategy_of(name), devices=2)

    loader = DataLoader(data(TRAIN), batch_size=BATCH, shuffle=True, drop_last=True)
    callback = ResMemCallback()
    callbacks = [callback, ModelCheckpoint(directory / "checkpoints")]
    if mode != "fit":
        failing_rank = int(mode[-1])
        dataset = Failing(TRAIN, failing_rank, 50 + failing_rank, kill=mode.startswith("kill"))
        loader = DataLoader(dataset, batch_size=BATCH)
        callbacks.append(Arm(dataset))
        trainer_with(*callbacks).fit(Net(), loader)
        return

    trainer = trainer_with(*callbacks)
    model, queries = Net(), rows(17, seed=9)[0]
    trainer.fit(model, loader, DataLoader(data(VAL, 1), batch_size=BATCH))
    found: dict[str, Any] = {}
    test = DataLoader(data(TEST, 2), batch_size=4)

    def look(stage: str, combined: Any) -> None:
        found[stage] = {
            "ids": combined.memory.ids.tolist(),
            "params": str(combined.memory.params),
            "predictions": combined.eval()(queries).tolist(),
        }

    look("fit", callback.module)
    if name != "ddp_spawn":  # which takes long to start its processes, and differs from ddp_forkserver in that alone
        found["test"] = trainer.test(model, test, verbose=False)[0]
    if name == "ddp":
        found["module test"] = trainer_with().test(callback.module, test, verbose=False)[0]
    if name not in ("ddp_notebook", "ddp_spawn"):  # ddp_notebook has the launcher of ddp_fork
        look("memorize", memorize(trainer_with(), model, loader, DataLoader(data(VAL, 1), BATCH)))
    if name in ("ddp", "ddp_fork"):
        # Other weights, and so another memory, in the same place.
        with torch.no_grad():
            model.body[0].weight.mul_(2.0)
        again = trainer_with(callback)
        again.fit(model, DataLoader(data(40), batch_size=BATCH), DataLoader(data(VAL, 1), batch_size=BATCH))
        look("second fit", callback.module)
        found["second test"] = again.test(model, test, verbose=False)[0]
    (directory / f"process{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["tests.ddp_scenarios"])
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
