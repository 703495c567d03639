"""Reads what an offline run of Weights & Biases wrote: a log of protocol buffers, in blocks as LevelDB has them."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 2**15, 7, struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """The records of a `run-ID.wandb` file."""
    data, position, parts = path.read_bytes(), _FILE_HEADER, b""
    assert data[:4] == b":W&B", f"{path} is no run file"
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # no header fits into what is left of the block
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        parts = (
            data[position : position + length]
            if kind in (_FULL, _FIRST)
            else parts + data[position : position + length]
        )
        position += length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


class OfflineRun:
    """What is in the directory of one offline run.

    Attributes:
        files: The directory of its files.
        history: What was logged, one dict for each call; what a table or image is made of has names like `key.path`.
        config: What the run was made with.
        summary: What stands for the run in a table of runs.
        metrics: How metrics were defined, by name.
        artifacts: Records of artifacts, by name.
        exit_code: None if the run has no end.
    """

    def __init__(self, directory: Path) -> None:
        (path,) = directory.glob("run-*.wandb")
        self.files = directory / "files"
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.metrics, self.artifacts, self.exit_code = {}, {}, None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append({name_of(i): json.loads(i.value_json) for i in record.history.item})
            elif kind == "run":
                self.config.update({name_of(i): json.loads(i.value_json) for i in record.run.config.update})
            elif kind == "config":
                self.config.update({name_of(i): json.loads(i.value_json) for i in record.config.update})
            elif kind == "summary":
                self.summary.update({name_of(i): json.loads(i.value_json) for i in record.summary.update})
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "artifact":
                self.artifacts[record.artifact.name] = record.artifact
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def last(self) -> dict[str, Any]:
        """The last value of everything that was logged."""
        return {name: value for logged in self.history for name, value in logged.items()}

    def image(self, name: str) -> Path:
        """The file of a logged image."""
        (file,) = self.last()[f"{name}.filenames"]
        return self.files / file

    def artifact_files(self, name: str) -> dict[str, Path]:
        """The files of an artifact, by their path in it."""
        return {entry.path: Path(entry.local_path) for entry in self.artifacts[name].manifest.contents}

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a logged table."""
        found = json.loads((self.files / self.last()[f"{name}.path"]).read_text())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def name_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def runs_in(directory: Path) -> list[OfflineRun]:
    return [OfflineRun(path) for path in sorted((directory / "wandb").glob("offline-run-*"))]
