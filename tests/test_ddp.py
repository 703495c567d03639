"""The memory pass and everything after it on several processes (gloo, on the CPU)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_resmem import ResMemParams
from tests import ddp_scenarios, language
from tests.ddp_processes import GROUP_SECONDS, run_ranks, run_script
from tests.ddp_scenarios import TRAIN, Net, rows

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "ddp_script.py"
WORLD_SIZES = (1, 2, 3)  # with three, one of them has no part of two rows
Found = dict[int, list[dict[str, Any]]]  # by world size, what each rank found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return in_worlds(ddp_scenarios.everything, tmp_path_factory)


@pytest.fixture(scope="module")
def of_loaders(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return in_worlds(ddp_scenarios.rows_of_loaders, tmp_path_factory)


def in_worlds(function: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    found = {}
    for size in WORLD_SIZES:
        directory = tmp_path_factory.mktemp(f"ranks{size}")
        found[size] = run_ranks(function, size, directory, directory)
        assert all(found[size]), f"a rank of {size} failed; its error is in the output"
    return found


# Which positions of the dataset each loader trains on.
POSITIONS = {
    "shuffle and drop_last": range(TRAIN),
    "one row": range(1),
    "three rows": range(3),
    "workers": range(TRAIN),
    "subset sampler": range(1, TRAIN, 2),
    "weighted sampler": [row for row in range(TRAIN) if row % 3],
    "batch sampler subclass": range(TRAIN),
    "own batch sampler": range(TRAIN),
    "own loader": range(TRAIN),
    "dict": [*range(20), *range(5), *range(8)],
    "no batch size": range(TRAIN),
    "stream": range(TRAIN),
    "limit": range(2 * ddp_scenarios.BATCH),
    "transfer hooks": range(TRAIN),
}


def test_all_loaders_are_expected() -> None:
    assert list(POSITIONS) == list(ddp_scenarios.loaders())


@pytest.mark.parametrize("name", POSITIONS)
def test_every_training_row_once(of_loaders: Found, name: str) -> None:
    inputs, targets = rows(TRAIN)
    for size, ranks in of_loaders.items():
        positions = list(POSITIONS[name])
        if name == "limit":  # so many batches on each rank
            positions = list(range(size * len(positions)))
        ids = list(range(len(positions))) if name == "dict" else positions
        for rank in ranks:
            held = rank[name]
            assert isinstance(held, dict), held
            assert held["ids"].tolist() == ids
            assert torch.equal(held["targets"], targets[positions])
            embeddings = Net().body(inputs[positions]).detach()
            torch.testing.assert_close(held["embeddings"], embeddings, rtol=1e-6, atol=1e-6)


def test_a_stream_over_several_ranks_warns(of_loaders: Found) -> None:
    for size, ranks in of_loaders.items():
        assert ranks[0].get("warned", []) == (["stream"] if size > 1 else [])


def same_memory(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert torch.equal(one["ids"], other["ids"])
    assert torch.equal(one["targets"], other["targets"])
    for name in ("embeddings", "outputs"):
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)
    same_params(one["params"], other["params"], tolerance)


def same_params(one: ResMemParams, other: ResMemParams, tolerance: float) -> None:
    assert one.gate == other.gate
    numbers = ("k", "sigma", "softmax_temperature", "strength")
    assert [getattr(one, n) for n in numbers] == pytest.approx([getattr(other, n) for n in numbers], rel=tolerance)


@pytest.mark.parametrize("name", ["fit", "memorize", "compiled"])
def test_the_memory_does_not_depend_on_the_number_of_ranks(found: Found, name: str) -> None:
    alone = found[1][0]
    assert alone[name]["ids"].tolist() == list(range(TRAIN))
    same_memory(alone[name], alone["compiled"] | {"params": alone[name]["params"]}, 1e-6)
    for ranks in found.values():
        for rank in ranks:
            same_memory(rank[name], alone[name], 1e-6)
            same_memory(rank[name], ranks[0][name], 0.0)  # between ranks, exactly


def test_every_rank_chooses_the_same_place_of_the_keys(found: Found) -> None:
    alone = found[1][0]["auto"]
    assert alone["width"] == 8
    assert [key["chosen"] for key in json.loads(alone["keys"])] == [False, True]
    for ranks in found.values():
        for rank in ranks:
            same_memory(rank["auto"], alone, 1e-5)
            assert rank["auto"]["width"] == 8
            assert rank["auto"]["keys"] == ranks[0]["auto"]["keys"]


def test_ranks_recall_what_was_known(found: Found) -> None:
    train, test = ddp_scenarios.Dated.data(TRAIN).tensors, ddp_scenarios.Dated.data(ddp_scenarios.TEST, 2).tensors
    known = train[2] + 8
    with torch.no_grad():
        away = torch.cdist(Net().body(test[0]).double(), Net().body(train[0]).double())
    away[known > test[2][:, None]] = torch.inf
    near, ids = away.topk(ddp_scenarios.DATED.k, largest=False)
    weights = (-near / ddp_scenarios.DATED.sigma).exp()
    votes = (weights[:, :, None] * torch.eye(3)[train[1][ids]]).sum(dim=1)
    votes = torch.where(weights.sum(dim=1, keepdim=True) > 0, votes, Net()(test[0]).detach())
    right = (votes.argmax(dim=1) == test[1]).double().mean()
    for ranks in found.values():
        for rank in ranks:
            same_memory(rank["dated"], found[1][0]["dated"], 1e-6)
            assert torch.equal(rank["dated"]["times"].T, torch.stack([train[2], known]).double())
            assert rank["dated test"]["test/acc_knn"] == pytest.approx(right.item())


def test_tokens_do_not_depend_on_the_number_of_ranks(found: Found) -> None:
    wanted = language.rows_of(language.Causal(), language.texts(23))
    test_rows = sum(len(text) - 1 for text in language.texts(11, seed=1))
    alone = found[1][0]
    for ranks in found.values():
        for rank in ranks:
            assert rank["tokens"]["ids"].tolist() == wanted.ids
            assert rank["tokens"]["targets"].tolist() == wanted.targets.tolist()
            assert rank["tokens"]["shift"] == "1"
            same_memory(rank["tokens"], alone["tokens"], 1e-5)
            same_memory(rank["sampled tokens"], alone["sampled tokens"], 1e-5)
            assert rank["sampled tokens"]["stats"] == alone["sampled tokens"]["stats"]
            assert len(rank["sampled tokens"]["ids"]) == 30
            assert rank["token rows"] == test_rows
            scores = {name: value for name, value in rank["token scores"].items() if name != "loss"}  # by batch
            assert scores == pytest.approx({name: alone["token scores"][name] for name in scores}, abs=1e-5)
            assert rank["token module scores"] == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true"])
def test_the_memory_in_half_precision(found: Found, name: str) -> None:
    for ranks in found.values():
        for rank in ranks:
            assert rank[name]["embeddings"].dtype == torch.float32
            same_memory(rank[name], ranks[0][name], 0.0)
            same_memory(rank[name], found[1][0][name], 0.02)
            assert rank[f"{name} test"]["test/acc_base"] == pytest.approx(
                found[1][0][f"{name} test"]["test/acc_base"], abs=1.5 / ddp_scenarios.TEST
            )


@pytest.mark.parametrize("name", ["tuning", "few validation rows"])
def test_the_same_params_are_chosen(found: Found, name: str) -> None:
    alone = found[1][0][name]
    assert alone.params.strength > 0
    for ranks in found.values():
        for rank in ranks:
            assert rank[name].params == ranks[0][name].params
            same_params(rank[name].params, alone.params, 1e-5)
            assert (rank[name].score, rank[name].base_score, rank[name].rows) == (
                alone.score,
                alone.base_score,
                alone.rows,
            )


def test_without_validation_rows_all_ranks_tune_on_the_same_rows_of_the_memory(found: Found) -> None:
    alone = found[1][0]["no validation rows"]
    assert alone.leave_one_out
    for ranks in found.values():
        for rank in ranks:
            assert rank["no validation rows"].params == ranks[0]["no validation rows"].params
            same_params(rank["no validation rows"].params, alone.params, 1e-5)
            assert rank["no validation rows"].rows == alone.rows


def test_the_same_predictions(found: Found) -> None:
    for ranks in found.values():
        for rank in ranks:
            torch.testing.assert_close(rank["predictions"], found[1][0]["predictions"], rtol=1e-5, atol=1e-5)
            assert torch.equal(rank["predictions"], ranks[0]["predictions"])


def test_scores_count_every_test_row_once(found: Found) -> None:
    alone = found[1][0]
    names = [name for name in alone if "test " in name]
    assert len(names) == 11
    for ranks in found.values():
        for rank in ranks:
            for name in names:
                scores = {score: value for score, value in rank[name].items() if "acc_" in score}
                assert len(scores) == 3
                assert scores == {score: alone[name][score] for score in scores}, name
    assert alone["batched test 31"] == alone["test 31"]
    assert alone["compiled test"]["test/acc_base"] == alone["test 31"]["test/acc_base"]


def test_ranks_agree_on_buffers(found: Found) -> None:
    """BatchNorm's statistics are those of rank zero, and the memory was filled with them."""
    for ranks in found.values():
        for rank in ranks:
            for name, buffer in rank["buffers"].items():
                assert torch.equal(buffer, ranks[0]["buffers"][name]), name
            torch.testing.assert_close(rank["norm"]["embeddings"], rank["norm embeddings"], rtol=1e-5, atol=1e-6)


# What is said on all ranks; `*` marks the rank that failed, which raises its own error.
FAILURES = {
    "dataset on rank 0": ("*0 OSError: row 100 cannot be read", "collecting training rows"),
    "dataset on rank 1": ("*1 OSError: row 1 cannot be read", "rehearsing the memory pass"),
    "validation set": ("*1 OSError: row 7 cannot be read", "collecting validation rows"),
    "forward": ("*1 ArithmeticError: the forward broke", "rehearsing the memory pass"),
    "memory.add": ("*1 MemoryError: no room for rows", "collecting training rows"),
    "memory_dataloader": ("*1 NotImplementedError: rank 1 does not know its length", "planning which rows to read"),
    "dirpath": ("*0 StorageError: The memory cannot be saved to", "looking where the memory will be saved"),
    "save": ("*0 StorageError: The memory cannot be saved to", "saving the memory"),
    "part of the rows": ("InputError: The loaders differ by rank: rank 0 reads", ""),
    "sampler of its own": ("InputError: The loaders differ by rank: rank 0 reads", ""),
    "stream": ("InputError: ids are repeated on several ranks: 0, 1, 2, 3, 4 and more", ""),
    "datamodule setup": ("*1 OSError: setup broke", "setting up the datamodule"),
    "datamodule train_dataloader": ("*1 OSError: train_dataloader broke", "making the loaders"),
    "datamodule val_dataloader": ("*1 OSError: val_dataloader broke", "making the loaders"),
}


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    ranks = run_ranks(ddp_scenarios.failures, 2, tmp_path, tmp_path)
    for rank, cases in enumerate(ranks):
        assert set(cases) == {*FAILURES, "nothing"}
        for name, (said, doing) in FAILURES.items():
            case = cases[name]
            if said.startswith("*") and int(said[1]) != rank:
                assert case["error"].startswith(f"MemoryPassError: Rank {said[1]} failed while {doing}"), case
                assert said[3:] in case["error"]
            else:
                assert case["error"].startswith(said[3:] if said.startswith("*") else said), case
            assert case["seconds"] < GROUP_SECONDS
            assert case["hooks"] == 0
            # A filled memory is kept when only its saving or tuning failed; half a memory never is.
            assert case["rows"] == (TRAIN if name in ("save", "validation set") else 0)
            # What can be known before training is; otherwise the trained weights are safe.
            early = name in ("forward", "memory_dataloader", "dirpath", "part of the rows", "sampler of its own")
            assert case.get("checkpoint", 0) == (0 if early or name.startswith("datamodule") else 1), name
        assert cases["nothing"]["error"] is None  # the job goes on
    assert [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name or "replaced" in entry.name] == []
    assert (tmp_path / "final" / "manifest.json").is_file()


def test_a_pass_takes_little_more_than_its_rows(tmp_path: Path) -> None:
    """100,000 rows of 128 floats on each of two ranks."""
    for dtype, ratio in ((torch.float32, 1.3), (torch.float16, 1.3)):
        for case in run_ranks(ddp_scenarios.large_pass, 2, tmp_path / str(dtype), tmp_path, 200_000, 128, dtype):
            print(dtype, case)
            assert case["rows"] == 200_000
            assert case["pass"] <= ratio * case["own"] + 16
            # Then every rank holds all rows, and its own only as long as they are exchanged.
            assert case["all"] <= 2 * case["own"] + case["own"] + 2 * 16 + 24 * 200_000 / 2**20 + 32


@pytest.mark.parametrize("rows", [1, 2, 12, ddp_scenarios.TEST])
def test_evaluations_count_every_row_once(found: Found, rows: int) -> None:
    """On some ranks there is nothing but padding."""
    alone = found[1][0][f"evaluation {rows}"]
    for ranks in found.values():
        for rank in ranks:
            seen, first = rank[f"evaluation {rows}"], ranks[0][f"evaluation {rows}"]
            assert (seen.rows, seen.scores, seen.flips) == (rows, first.scores, first.flips)
            assert seen.scores == pytest.approx(alone.scores, abs=1e-5)
            flips = [[(f.position, f.target, f.base, f.resmem, f.neighbor_ids) for f in e.flips] for e in (seen, alone)]
            assert flips[0] == flips[1]
            assert torch.equal(seen.neighborhoods.counts, alone.neighborhoods.counts)
            torch.testing.assert_close(seen.neighborhoods.upper, alone.neighborhoods.upper, rtol=1e-4, atol=1e-5)
            for name, bins in alone.reliability.items():
                assert torch.equal(seen.reliability[name].counts, bins.counts)
    assert rows < ddp_scenarios.TEST or alone.flips


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_forkserver", "ddp_fork", "ddp_notebook"])
def test_a_script(tmp_path: Path, found: Found, strategy: str) -> None:
    script = run_script(SCRIPT, strategy, "fit", tmp_path)
    assert script.code == 0, script.output[-4000:]
    assert script.left == []
    processes = sorted(tmp_path.glob("process*.json"))
    # Under all but ddp only the main process comes to the end of the script.
    assert len(processes) == (2 if strategy == "ddp" else 1)
    alone = found[1][0]
    for process in processes:
        seen = json.loads(process.read_text())
        assert seen["fit"]["ids"] == list(range(TRAIN))
        if strategy != "ddp_spawn":
            assert seen["test"]["test/acc_base"] == alone["test 31"]["test/acc_base"]
        if strategy not in ("ddp_notebook", "ddp_spawn"):
            assert seen["memorize"] == seen["fit"]
        if strategy == "ddp":
            assert seen["module test"]["test/acc_resmem"] == seen["test"]["test/acc_resmem"]
            assert seen["module test"].items() <= seen["test"].items()
        if strategy in ("ddp", "ddp_fork"):
            assert seen["second fit"]["ids"] == list(range(40))
            assert seen["second fit"]["predictions"] != seen["fit"]["predictions"]
            assert seen["second test"]["test/acc_base"] != seen["test"]["test/acc_base"]
        (tmp_path / "first.json").write_text(json.dumps(seen))
    directories = [entry.name for entry in tmp_path.iterdir() if entry.is_dir()]
    assert sorted(name.split("-")[0] for name in directories) == ["checkpoints", "resmem"]


@pytest.mark.parametrize(("strategy", "failing_rank"), [("ddp", 0), ("ddp", 1), ("ddp_fork", 1)])
def test_a_script_that_fails(tmp_path: Path, strategy: str, failing_rank: int) -> None:
    script = run_script(SCRIPT, strategy, f"raise{failing_rank}", tmp_path)
    assert script.code != 0
    assert f"OSError: row {50 + failing_rank} cannot be read" in script.output
    assert script.left == []
    assert left_on_disk(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_script_of_which_a_rank_is_killed(tmp_path: Path, failing_rank: int) -> None:
    script = run_script(SCRIPT, "ddp", f"kill{failing_rank}", tmp_path)
    assert script.code != 0
    assert script.seconds < GROUP_SECONDS + 20  # most of it is the start of two interpreters
    assert script.left == []
    assert left_on_disk(tmp_path) == ["checkpoints"]


def left_on_disk(directory: Path) -> list[str]:
    assert len(list((directory / "checkpoints").glob("*.ckpt"))) == 1
    return sorted(entry.name for entry in directory.iterdir())
