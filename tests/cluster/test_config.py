"""What a pool cannot be made with."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resmem import InputError, RayMemory
from lightning_resmem.cluster.config import default_storage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shards": 0}, "num_shards=0"),
        ({"num_shards": 2.0}, "num_shards=2.0"),
        ({"replicas": 0}, "replicas=0"),
        ({"cpus_per_shard": -1}, "cpus_per_shard=-1"),
        ({"cpus_per_shard": 0}, "needs one or the other"),
        ({"gpus_per_shard": "all"}, "gpus_per_shard='all'"),
        ({"gpus_per_shard": 1.5}, "gpus_per_shard=1.5"),
        ({"placement": "EVEN"}, "STRICT_SPREAD"),
        ({"on_shard_loss": "ignore"}, "partial"),
        ({"request_timeout_s": 0}, "request_timeout_s=0"),
        ({"address": "ray://head:10001"}, "Ray Client"),
        ({"name": ""}, "name=''"),
        ({"name": "../others"}, r"name='../others' .* storage_path"),
        ({"name": "a/b"}, "name='a/b' .* cannot have '/'"),
        ({"name": "a\\b"}, "name="),
        ({"name": "a..b"}, r"cannot have '\.\.'"),
        ({"name": "a*"}, r"name='a\*'"),
        ({"name": "s3::a"}, "name='s3::a'"),
        ({"storage_path": 3}, "storage_path=3"),
        ({"storage_path": "simplecache::nosuch://rows"}, "storage_path='simplecache::nosuch://rows' .* nosuch"),
        ({"index": ""}, "index=''"),
        ({"index": "exakt"}, "index='exakt' is not understood"),
        ({"values": "half"}, "values='half'"),
        ({"key_dtype": torch.int8}, "key_dtype"),
        ({"task": "multiclass"}, "task='multiclass'"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_written(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RayMemory(**arguments)


def test_names_of_letters_digits_and_dots_are_taken() -> None:
    assert RayMemory(name="team-a_run.2 é").shards.config.name == "team-a_run.2 é"


def test_each_user_has_a_place_for_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(default_storage())
    assert own.parent == Path(tempfile.gettempdir())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert Path(default_storage()) != own
