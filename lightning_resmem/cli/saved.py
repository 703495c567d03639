"""The commands that read a saved memory, without the model, its data or Lightning."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning_resmem.errors import InputError, StorageError
from lightning_resmem.memory.storage.glance import at_a_glance
from lightning_resmem.memory.storage.manifest import MANIFEST
from lightning_resmem.memory.storage.paths import as_path

# Of the provenance; what else it holds is for programs.
_FROM = ("head", "embedding", "fingerprint")


def stats(given: Namespace) -> None:
    """Print what a saved memory holds."""
    found = at_a_glance(given.directory)
    if given.verify:
        from lightning_resmem.memory.storage.saved import read_saved

        with read_saved(given.directory, mmap=True) as saved:
            saved.verify()
    _say(json.dumps(found, indent=2) if given.json else _table({**_words(found), **_checked(given.verify)}))


def inspect(given: Namespace) -> None:
    """Write the HTML report of a saved memory."""
    from lightning_resmem.reporting.html_report import write_report

    place = as_path(given.directory)
    output = given.output or f"{place.resolve().name if isinstance(place, Path) else place.name}-report.html"
    _say(f"Wrote {write_report(given.directory, output, given.rows, given.k, not given.no_verify)}")


def convert(given: Namespace) -> None:
    """Save a memory in another way, or two as one."""
    target = as_path(given.target)
    if not given.overwrite and (target / MANIFEST).is_file():
        raise StorageError(f"{target} holds a memory: it is left as it is. Give --overwrite to replace it.")
    if given.renumber and not given.merge:
        raise InputError("--renumber is for the rows of --merge, which is not given.")
    from contextlib import ExitStack

    from lightning_resmem.memory.converting import converted
    from lightning_resmem.memory.storage.disk import check_target
    from lightning_resmem.memory.storage.saved import read_saved

    check_target(target)
    with ExitStack() as stack:
        places = [given.source, *([given.merge] if given.merge else [])]
        sources = [stack.enter_context(read_saved(place, mmap=True)) for place in places]
        memory = converted(sources, _kept(given), given.renumber)
        _say(f"Saved a memory of {len(memory):,} rows to {memory.save(target)}.")


def _kept(given: Namespace) -> Any:
    """What the options ask for."""
    import torch

    from lightning_resmem.memory.converting import Kept
    from lightning_resmem.memory.values.dense import DenseConfig
    from lightning_resmem.memory.values.sparse import SparseConfig

    values: DenseConfig | SparseConfig | None = None
    if given.top_m is not None and given.values != "sparse":
        raise InputError("--top-m is for sparse values, which lose what is cut: give --values=sparse, too.")
    if given.values == "sparse":
        if given.value_dtype:
            raise InputError("--top-m is for sparse values, --value-dtype for dense ones: give one of them.")
        values = SparseConfig() if given.top_m is None else SparseConfig(given.top_m)
    elif given.value_dtype or given.values == "dense":
        values = DenseConfig(getattr(torch, given.value_dtype) if given.value_dtype else None)
    return Kept(given.index, values, getattr(torch, given.key_dtype) if given.key_dtype else None)


def _words(found: dict[str, Any]) -> dict[str, str]:
    """The numbers for people."""
    index, provenance = found["index"], found["provenance"]
    values = found["values"].get("kind", "dense")
    return {
        "memory": found["path"],
        "task": found["task"],
        "rows": f"{found['rows']:,}",
        "key width": f"{found['width']:,} ({found['tensors']['keys']})",
        "outputs": f"{found['outputs']:,} ({values})",
        "on disk": f"{found['bytes']:,} bytes",
        "index": index if isinstance(index, str) else str(index.get("factory")),
        "params": ", ".join(f"{name}={value}" for name, value in found["params"].items() if value is not None),
        "params from": "measuring or tuning" if found["tunable"] else "the user",
        **{name: provenance[name] for name in _FROM if name in provenance},
    }


def _checked(verify: bool) -> dict[str, str]:
    return {"checksums": "match"} if verify else {}


def _table(words: dict[str, str]) -> str:
    width = max(map(len, words))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in words.items())


def _say(words: str) -> None:
    # File names need not be text.
    sys.stdout.write(words.encode(errors="backslashreplace").decode() + "\n")
