"""What `faults_script.py` found: actors, nodes, storage and the driver die, and no answer is ever wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.interpreters import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    directory = tmp_path_factory.mktemp("faults")
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "faults_script.py"), str(directory)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=540,
        check=True,
    )
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(autouse=True)
def _none_failed(found: Found) -> None:
    failed = {name: result["failed"] for name, result in found.items() if "failed" in result}
    assert not failed, "\n".join(failed.values())


def test_actors_killed_while_rows_arrive_and_while_they_build(found: Found) -> None:
    assert found["killed_while_filling"] == {"right": True, "rows": 4000, "half-built": [], "storage": []}


def test_actors_killed_while_queries_are_under_way(found: Found) -> None:
    result = found["killed_while_asked"]
    assert result["wrong"] == []
    assert result["asked"] > 30
    assert result["restarts"] == [1, 1]
    assert result["right"]


def test_changes_after_the_last_build_survive(found: Found) -> None:
    assert found["edits_survive"] == {"right": True, "rows": 3999}


def test_lost_rows_are_an_error_never_a_wrong_answer(found: Found) -> None:
    result = found["rows_lost"]
    assert "ShardUnavailableError: Shard 0 of 1" in result["error"]
    assert "does not hold its rows" in result["error"]
    assert result["right after filling it again"]


def test_a_replica_that_lost_its_rows_copies_them(found: Found) -> None:
    result = found["rows_lost"]
    assert result["right with a replica"]
    assert result["copied"]
    assert result["right from the copy"]


def test_a_damaged_change_is_named_or_copied_from_the_replica(found: Found) -> None:
    result = found["journal_damaged"]
    assert result["error with 1"].startswith("ShardUnavailableError: Shard 0 of 1")
    assert result["named"]
    assert result["right after filling it again"]
    assert result["right with 2"]


def test_with_two_replicas_the_death_of_a_node_is_not_noticed(found: Found) -> None:
    result = found["node_dies_with_replicas"]
    assert result["nodes of each shard"] == [2, 2]
    assert result["wrong"] == 0
    assert result["metrics"] == {"resmem/shards_alive": 2.0, "resmem/coverage": 1.0}


def test_with_two_replicas_both_are_asked(found: Found) -> None:
    assert min(found["node_dies_with_replicas"]["searches of each replica"]) > 0


@pytest.mark.parametrize("queries", ["asked", "asked afterwards"])
def test_with_two_replicas_a_dead_one_is_waited_for_once(queries: str, found: Found) -> None:
    seconds = found["node_dies_with_replicas"][queries]
    # A query asks twice, and after two seconds the other replica; two of the replicas are dead.
    assert max(seconds) < 5.0
    assert sum(second > 1.0 for second in seconds) <= 2


def test_the_shard_of_a_dead_node_moves(found: Found) -> None:
    assert found["node_dies_and_its_shard_moves"] == {"wrong": 0, "moved": True, "right": True}


def test_a_shard_without_a_place_is_an_error_in_time(found: Found) -> None:
    result = found["no_place_left"]
    assert "ShardUnavailableError: Shard 0 of 2" in result["error"]
    assert result["node"][:12] in result["error"]
    assert "Its last answer was" in result["error"]
    assert 3.5 < result["error after"] < 15.0
    assert result["right for the other"]


def test_partial_answers_say_so(found: Found) -> None:
    result = found["no_place_left"]
    assert result["partial is right"]
    assert result["second partial answer after"] < 2.0
    assert result["metrics"] == {"resmem/shards_alive": 1.0, "resmem/coverage": pytest.approx(result["share"])}
    assert result["alive"] == [False, True]
    assert len(result["warnings"]) == 1
    assert "shard 0" in result["warnings"][0]


def test_a_node_that_comes_back_completes_the_answers(found: Found) -> None:
    assert found["no_place_left"]["comes back"]
    assert found["no_place_left"]["right"]


def test_actors_end_with_the_process_that_made_them_unless_they_are_named(found: Found) -> None:
    assert found["driver_dies"] == {"gone": True, "kept": 3, "ended": True, "swept": True}
