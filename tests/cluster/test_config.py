"""What a pool cannot be made with."""

from typing import Any

import pytest
import torch

from lightning_resmem import InputError, RayMemory


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
