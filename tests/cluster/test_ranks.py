"""The callback with a RayMemory on two ranks of ddp, without a cluster and with one."""

import json
from pathlib import Path

import pytest
import torch

from tests.ddp_processes import run_script
from tests.ddp_scenarios import TRAIN

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parent / "ranks_script.py"


# Ray is asked for by a fixture, never within a test: what a test starts is ended with it.
def test_ranks_fill_and_ask_the_same_shards_of_a_running_cluster(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    check_ranks(tmp_path)


def test_ranks_fill_and_ask_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a user starts it: Ray changes the environment of a process that has used it.
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_ranks(tmp_path)


def check_ranks(tmp_path: Path) -> None:
    finished = run_script(SCRIPT, "fit", tmp_path, seconds=240.0)
    assert finished.code == 0, finished.output[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for stage in ("fit", "restored", "again"):
        assert first[stage]["kind"] == "RayMemory"
        assert first[stage]["ids"] == list(range(TRAIN))
        assert sum(first[stage]["shards"]) == TRAIN
        assert len(first[stage]["shards"]) == 2
        assert first[stage]["params"] == first["local"]["params"]
        found, expected = (torch.tensor(first[name]["predictions"]) for name in (stage, "local"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "test/acc_resmem" in first["test"]
    assert first["restored test"] == first["test"]
    assert not list((tmp_path / "shards").iterdir())  # rank 0 has ended, and its shards with it
    assert finished.left == []


def test_without_room_both_ranks_say_so(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    check_failure(tmp_path, "room", "There is no room for 2 shards")


@pytest.mark.parametrize(
    ("mode", "message"),
    [("fail", "OSError: row 51 cannot be read"), ("hosts", "ray start --head --port=6379")],
)
def test_what_fails_on_one_rank_fails_on_both_at_once(
    mode: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_failure(tmp_path, mode, message)


def check_failure(tmp_path: Path, mode: str, message: str) -> None:
    finished = run_script(SCRIPT, mode, tmp_path, seconds=120.0)
    assert finished.code != 0
    assert message in finished.output
    assert "MemoryPassError" in finished.output or "Rank 0 failed" in finished.output
    assert finished.left == []
