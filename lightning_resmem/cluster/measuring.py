"""One map of the keys for all shards, fitted from the rows of all of them. Knows nothing of Ray."""

import safetensors.torch

from lightning_resmem.cluster.client import ShardClient
from lightning_resmem.memory.metric import KeyMap, Moments, within_class


def measure_alike(shards: ShardClient) -> None:
    """Have all shards compare keys in the space within classes: that of all rows there are now, unless they have one.

    Args:
        shards: With rows in at least one of them, none of them on its way.
    """
    if all(shards.ask("key_map").result()):
        return
    key_map = map_of(shards)  # of some, where a process died before it had told all
    if key_map is None:
        parts = (safetensors.torch.load(part) for part in shards.ask("moments").result() if part)
        key_map = within_class([Moments(**part) for part in parts])
    shards.send_all("measure", {name: part.contiguous() for name, part in key_map._asdict().items()})
    shards.flush()


def map_of(shards: ShardClient) -> KeyMap | None:
    """What all shards map keys by, if they do."""
    found = next(filter(None, shards.ask("key_map").result()), None)
    return None if found is None else KeyMap(**safetensors.torch.load(found))
