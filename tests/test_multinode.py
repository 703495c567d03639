"""examples/multinode.py: a node dies between two tests, and nobody sees it in the results."""

import re
from pathlib import Path

import pytest

from tests.ddp_processes import run_script
from tests.interpreters import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]  # processes start slowly on a busy machine

NODE = "[0-9a-f]{6}"


def test_the_same_accuracy_after_the_death_of_a_node(tmp_path: Path) -> None:
    ended = run_script(ROOT / "examples" / "multinode.py", "--epochs", "5", seconds=280)
    assert ended.code == 0, ended.output
    assert ended.left == []

    nodes = re.search(rf"Three nodes: ({NODE}), ({NODE}), ({NODE})$", ended.output, re.MULTILINE).groups()
    places = re.findall(rf"shard (\d): (\d+) rows on node ({NODE})(?:, started again (\d+))?", ended.output)
    before, after = places[:3], places[3:]
    assert {node for _, _, node, _ in before} == set(nodes)
    assert [rows for _, rows, _, _ in before] == [rows for _, rows, _, _ in after]
    assert sum(int(rows) for _, rows, _, _ in after) == 1000

    killed, shard = re.search(rf"node ({NODE}) is killed, with shard (\d)", ended.output).groups()
    assert killed in nodes
    assert killed not in {node for _, _, node, _ in after}
    assert [number for number, _, _, restarts in after if restarts] == [shard]

    tests = re.findall(r"test: base ([\d.]+), resmem ([\d.]+) in", ended.output)
    assert len(tests) == 2
    assert tests[0] == tests[1]
    assert float(tests[0][1]) > 0.9
    assert ended.stdout.endswith("The same accuracy.\n")
    assert "raylet" not in ended.output
