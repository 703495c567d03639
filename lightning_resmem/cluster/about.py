"""What shards keep for whoever connects to them: params and provenance of the whole memory, never read there."""

import json
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_resmem.params import ResMemParams


class About(NamedTuple):
    """What a memory is besides its rows: its attributes of these names.

    Attributes:
        params: None if they were neither given nor measured.
        tunable: Whether they may be tuned.
        provenance: Where the rows come from.
    """

    params: ResMemParams | None
    tunable: bool
    provenance: dict[str, str]

    def tensor(self) -> Tensor:
        """As it travels to a shard: bytes, `(n,)`."""
        text = json.dumps(self._asdict() | {"params": None if self.params is None else asdict(self.params)})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def about_of(states: list[list[dict[str, Any]]]) -> About | None:
    """What the shards were told, if anything; `states` has that of each replica of each shard."""
    text = next((state["about"] for (state, *_) in states if state["about"]), "")
    if not text:
        return None
    about = json.loads(text)
    return About(**about | {"params": None if about["params"] is None else ResMemParams(**about["params"])})
