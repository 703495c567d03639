"""Exact search as a GPU does it, without one: Triton interprets its kernels, and compiles them for one."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_resmem import InputError, LocalMemory, Multiclass, RayMemory, ResMemParams
from lightning_resmem.memory import following
from lightning_resmem.memory.local_config import LocalConfig
from lightning_resmem.memory.search import groups

POINTERS = {"q_ptr": "*fp16", "z_ptr": "*fp16", "out_ptr": "*fp16", "limits_ptr": "*fp16"}
POINTERS |= {"values_ptr": "*fp16", "kept_ptr": "*fp16", "sure_ptr": "*i1", "all_sure_ptr": "*i1"}
POINTERS |= dict.fromkeys(("chosen_ptr", "columns_ptr", "groups_ptr", "places_ptr", "positions_ptr"), "*i64")
NUMBERS = {"scale": "fp32", "kept": "fp32", "unit": "fp32"}
SIZES = {
    "_round_queries": {"D": 20, "W": 24, "BLOCK": 32},
    "_group_minima": {"W": 24, "G": 32, "BB": 16, "BN": 128, "BD": 32, "STAGES": 2},
    "_measure_groups": {"WHOLE": False, "D": 20, "G": 32, "ROWS": 32, "BD": 32},
    "_smallest": {"PIECE": 1024, "HAS_COLUMNS": True},
    "_take_nearest": {"G": 32, "WHOLE": False, "SCREENED": True, "ALL": False, "OWN": 128, "OTHER": 32},
}
OF_FEW = ("_measure_groups", "_take_nearest")  # keys, all of which are measured


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    # Triton looks at the environment when it is imported, and torch.compile may have imported it here.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider"]
    file = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, timeout=560)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(("name", "whole"), [*((name, False) for name in SIZES), *((name, True) for name in OF_FEW)])
def test_kernels_compile(name: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler refuses more than the interpreter does; it needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_resmem.memory.search import certifying, kernels, selecting

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    [kernel] = [vars(module)[name] for module in (kernels, certifying, selecting) if name in vars(module)]
    sizes = SIZES[name] | ({"WHOLE": True} if whole else {})
    types = {each: "*fp32" if each.endswith("_ptr") else "i32" for each in kernel.arg_names}
    types |= {each: kind for each, kind in (POINTERS | NUMBERS).items() if each in types}
    source = ASTSource(
        kernel,
        types | dict.fromkeys(sizes, "constexpr"),
        {(kernel.arg_names.index(each),): size for each, size in sizes.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert compiled.asm["cubin"]


def test_a_cpu_does_without() -> None:
    assert not groups.runs_on(torch.device("cpu"))


def test_the_choice_of_a_copy_reaches_the_index_and_other_processes() -> None:
    for chosen in ({}, {"half_copy": False}):
        memory = LocalMemory(params=ResMemParams(k=1, sigma=1.0), **chosen)
        memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        memory.build()
        for each in (memory, pickle.loads(pickle.dumps(memory))):
            assert each._rows.index.half_copy is chosen.get("half_copy", True)
    assert RayMemory(half_copy=False)._template._config.half_copy is False
    with pytest.raises(InputError, match="half_copy='no'"):
        LocalMemory(half_copy="no")


def test_the_estimate_counts_the_copy_and_what_a_search_takes() -> None:
    rows, width, gpu = 10**6, 100, torch.device("cuda")
    with_copy, without = (
        LocalConfig(Multiclass(), "auto", "auto", torch.float32, half_copy).estimate_bytes(rows, width, 10, gpu)
        for half_copy in (True, False)
    )
    assert with_copy["index"] - without["index"] == rows * 104 * 2
    assert without["index"] > 4 * rows + 512 * 2**20


@pytest.mark.parametrize(("half_copy", "goes"), [(True, False), (False, True)])
def test_a_memory_goes_where_its_copy_has_room_too(
    half_copy: bool, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_to = []
    memory = LocalMemory(params=ResMemParams(k=1, sigma=1.0), half_copy=half_copy)
    memory.add(torch.randn(1000, 64), torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.long))
    with_copy = memory.stats()["bytes"] + groups.kept_bytes(1000, 64, torch.float32, half_copy=True)
    monkeypatch.setattr(following, "free_bytes", lambda device: 2 * (with_copy + groups.WORK_BYTES) - 1)
    monkeypatch.setattr(memory, "to", moved_to.append)
    following.build_near(memory, torch.device("cuda"))
    assert bool(moved_to) == goes
    assert memory.is_built
