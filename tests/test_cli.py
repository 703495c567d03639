"""The `resmem` command, in this process where that is possible: building Lightning's parsers takes seconds."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI

import lightning_resmem
from examples.digits_module import Classifier, Digits
from lightning_resmem import (
    GridTuner,
    InputError,
    LocalMemory,
    ResMemCallback,
    ResMemModule,
    ResMemParams,
    ResMemWarning,
    StaleMemoryError,
    StorageError,
)
from lightning_resmem.cli.main import main
from lightning_resmem.cli.options import TRAINING
from lightning_resmem.cli.training import ResMemTrainer, _use_saved
from lightning_resmem.memory.storage import files
from lightning_resmem.model.fingerprint import fingerprint
from tests.saved_files import edited, file_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "digits.yaml")


@pytest.fixture
def resmem(tmp_path, monkeypatch, capsys):
    """Run a command in an empty directory: its exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["resmem", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def saved(tmp_path):
    memory = LocalMemory(params=ResMemParams(k=2))
    memory.add(torch.rand(20, 3), torch.zeros(20, 2), torch.arange(20) % 2)
    return memory.save(tmp_path / "some memory")


# -- inspect


def test_inspect_writes_a_page_into_the_current_directory(resmem, saved, tmp_path):
    status, out, err = resmem("inspect", saved)
    page = tmp_path / "some memory-report.html"
    assert (status, out, err) == (0, f"Wrote {page}\n", "")
    assert "<h1>some memory</h1>" in page.read_text()


def test_inspect_options(resmem, saved, tmp_path):
    shutil.copytree(saved, damaged := tmp_path / "damaged")
    with file_of(damaged, "keys").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    status, out, _ = resmem("inspect", damaged, "--output", "a/b.html", "--rows", 7, "--k", 1, "--no-verify")
    assert (status, out) == (0, f"Wrote {tmp_path / 'a' / 'b.html'}\n")
    page = (tmp_path / "a" / "b.html").read_text()
    assert "7 random rows" in page
    assert "1 nearest other rows" in page
    status, out, err = resmem("inspect", damaged)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"resmem: .*keys-\w+.safetensors is damaged: its sha256 is .*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "There is no saved memory at .*missing: no such directory"),
        (["."], "is not a saved memory: it has no manifest.json"),
        (["some memory", "--rows", "0"], "rows=0"),
        (["some memory", "--output", "some memory"], "cannot be written"),
    ],
)
def test_inspect_tells_errors_in_one_line(resmem, saved, arguments, message):
    status, out, err = resmem("inspect", *arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert re.match(f"resmem: .*{message}", err)


def _pipe(directory):
    file = file_of(directory, "keys")
    file.unlink()
    os.mkfifo(file)


def _nested(directory):
    (directory / "manifest.json").write_bytes(b"[" * 100_000)


def _nan(directory):
    file = file_of(directory, "outputs")
    outputs = safetensors.torch.load_file(file)["outputs"].clone()
    outputs[3] = torch.nan
    safetensors.torch.save_file({"outputs": outputs}, file)
    edited(directory, lambda manifest: manifest["tensors"]["outputs"].update(sha256=files.sha256(file)))


@pytest.mark.parametrize(
    ("harm", "message"),
    [(_pipe, "it is not a regular file"), (_nested, "manifest.json cannot be read"), (_nan, "outputs holds NaN")],
)
@pytest.mark.parametrize("options", [[], ["--no-verify"]])
def test_inspect_tells_what_cannot_be_read_in_one_line(resmem, saved, harm, message, options):
    harm(saved)
    status, out, err = resmem("inspect", saved, *options)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert re.match(f"resmem: .*{message}", err)


def test_inspect_and_names_that_are_no_text(resmem, saved, tmp_path):
    memory = LocalMemory.load(saved)
    memory.provenance = {"head": "half a character \ud800"}
    name = os.fsdecode(b"na\xffme")
    memory.save(tmp_path / name)
    status, out, err = resmem("inspect", name)
    assert (status, err) == (0, "")
    assert out.endswith("na\\udcffme-report.html\n")
    assert "half a character" in (tmp_path / f"{name}-report.html").read_text()


def test_inspect_reads_urls(resmem, saved, tmp_path):
    LocalMemory.load(saved).save(f"memory://{tmp_path.name}/some memory")
    status, _, err = resmem("inspect", f"memory://{tmp_path.name}/some memory")
    assert (status, err) == (0, "")
    assert (tmp_path / "some memory-report.html").is_file()
    status, _, err = resmem("inspect", saved, "--output", "memory://page.html")
    assert status == 1
    assert "output='memory://page.html' is a URL: give a file of this machine" in err


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--rows", "many"]])
def test_inspect_usage(resmem, arguments):
    status, _, err = resmem("inspect", *arguments)
    assert status == 2
    assert "usage: resmem inspect" in err


# -- stats


def test_stats_says_what_a_memory_holds(resmem, saved):
    status, out, err = resmem("stats", saved)
    assert (status, err) == (0, "")
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert told["memory"] == str(saved)
    assert told["rows"] == "20"
    assert told["key width"] == "3 (float32)"
    assert told["outputs"] == "2 (dense)"
    assert told["params"].startswith("k=2, ")


def test_stats_as_json_are_those_of_the_memory(resmem, saved):
    status, out, _ = resmem("stats", saved, "--json")
    told, memory = json.loads(out), LocalMemory.load(saved)
    assert status == 0
    stats = memory.stats()
    assert {name: told[name] for name in ("rows", "width", "outputs", "index")} == {
        name: stats[name] for name in ("rows", "width", "outputs", "index")
    }
    assert ResMemParams(**told["params"]) == memory.params
    assert told["bytes"] == sum(file.stat().st_size for file in saved.iterdir() if file.suffix == ".safetensors")


def test_stats_reads_urls(resmem, saved, tmp_path):
    LocalMemory.load(saved).save(url := f"memory://{tmp_path.name}/stats")
    here, there = (json.loads(resmem("stats", place, "--json")[1]) for place in (saved, url))
    assert there == {**here, "path": url}


def test_stats_verify_reads_the_files(resmem, saved):
    assert resmem("stats", saved, "--verify")[1].endswith("checksums    match\n")
    with file_of(saved, "keys").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert resmem("stats", saved)[0] == 0
    status, out, err = resmem("stats", saved, "--verify")
    assert (status, out) == (1, "")
    assert "is damaged: its sha256 is" in err
    file_of(saved, "keys").unlink()
    status, _, err = resmem("stats", saved)
    assert status == 1
    assert re.search(r"keys-\w+\.safetensors is missing", err)


# -- convert


def test_convert_keeps_rows_in_another_way(resmem, saved):
    ways = ("--key-dtype=float16", "--value-dtype=float16", "--index=exact")
    status, out, err = resmem("convert", saved, "half", *ways)
    assert (status, err) == (0, "")
    assert out.startswith("Saved a memory of 20 rows to ")
    before, after = LocalMemory.load(saved), LocalMemory.load("half")
    assert after.stats()["key_dtype"] == "float16"
    assert after.fetch(after.ids).outputs.dtype == torch.float16
    queries = torch.rand(5, 3)
    assert torch.allclose(after(queries), before(queries), atol=5e-3)
    status, _, err = resmem("convert", saved, "half")
    assert status == 1
    assert "holds a memory: it is left as it is. Give --overwrite" in err
    assert resmem("convert", saved, "half", "--overwrite", "--values=sparse", "--top-m=1")[0] == 0
    assert json.loads(resmem("stats", "half", "--json")[1])["values"]["top_m"] == 1


def test_convert_merges_memories_of_one_base(resmem, saved, tmp_path):
    status, _, err = resmem("convert", saved, "both", "--merge", saved)
    assert status == 1
    assert "20 ids are in more than one of the memories, 0 the first" in err
    assert resmem("convert", saved, "both", "--merge", saved, "--renumber")[0] == 0
    one, both = LocalMemory.load(saved), LocalMemory.load("both")
    assert torch.equal(both.ids, torch.arange(40))
    assert torch.equal(both.search(one._query_rows(one.ids), k=2).ids.sort().values[:, 1], one.ids + 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--renumber"], "--renumber is for the rows of --merge"),
        (["--values=dense", "--top-m=3"], "--top-m is for sparse values"),
        (["--top-m=3"], "give --values=sparse"),
        (["--index=Nonsense"], "Nonsense"),
    ],
)
def test_convert_refuses_in_one_line(resmem, saved, tmp_path, arguments, message):
    status, _, err = resmem("convert", saved, "new", *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err
    assert not (tmp_path / "new").exists()


# -- what holds for all commands


def test_debug_shows_where_an_error_comes_from(resmem):
    assert resmem("stats", "missing")[0] == 1
    with pytest.raises(StorageError, match="no such directory"):
        resmem("--debug", "stats", "missing")


def test_version(resmem):
    assert resmem("--version")[:2] == (0, f"{lightning_resmem.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command_and_option(resmem, shell):
    status, out, _ = resmem("--print-completion", shell)
    assert status == 0
    assert all(word in out for word in [*TRAINING, "stats", "inspect", "convert", "key-dtype", "ckpt_path"])


@pytest.mark.slow
def test_help_and_stats_start_without_torch_and_convert_without_lightning(saved):
    code = (
        "import contextlib, sys\n"
        "from lightning_resmem.cli.main import main\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = ['resmem', *line.split('|')]\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    heavy = {'torch', 'lightning', 'torchmetrics', 'ray', 'wandb'}\n"
        "    print('loaded', *sorted(heavy & {*sys.modules}))\n"
    )
    light = ["--help", "inspect|--help", "convert|--help", f"stats|{saved}"]
    heavier = [f"convert|{saved}|{saved.parent / 'new'}", f"inspect|{saved}|--output|{saved.parent / 'page.html'}"]
    command = [sys.executable, "-c", code, *light, *heavier]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert loaded == ["loaded"] * len(light) + ["loaded torch"] * len(heavier)


def test_the_commands_of_lightning_are_all_there():
    assert set(TRAINING) == {*LightningCLI.subcommands(), "memorize", "tune"}


def test_inspect_does_without_jsonargparse_and_the_rest_names_the_extra(resmem, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert resmem("inspect", saved)[0] == 0
    status, _, err = resmem("fit", "--config", CONFIG)
    assert status == 1
    assert 'pip install "lightning-resmem[cli]"' in err


@pytest.mark.slow
def test_python_m(saved, tmp_path):
    command = [sys.executable, "-m", "lightning_resmem", "inspect", saved.name]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "some memory-report.html").is_file()


def test_the_command_is_installed():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"resmem": f"{main.__module__}:{main.__name__}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct", "x"], "'inspct' is no subcommand"),
        (["Fit"], "'Fit' is no subcommand"),
        ([], "a subcommand is missing"),
    ],
)
def test_what_is_no_subcommand_lists_all_of_them(resmem, arguments, message):
    status, out, err = resmem(*arguments)
    assert (status, out) == (2, "")
    commands = "fit, validate, test, predict, memorize, tune, stats, inspect, convert"
    assert f"error: {message}: give one of {commands}, or --help." in err


# -- the subcommands of LightningCLI, with the config that ships


def test_help_explains_the_arguments_of_the_callback(resmem):
    status, out, _ = resmem("fit", "--trainer.callbacks.help=lightning_resmem.ResMemCallback")
    assert status == 0
    told = " ".join(out.split())
    for argument, words in {
        "head": "Name of the module whose input is the embedding",
        "embedding": "Name of the module whose output is the key",
        "targets_fn": "`targets_fn(batch)` returns the targets",
        "forward_fn": "`forward_fn(model, batch)` runs the model",
        "ids_fn": "`ids_fn(batch)` returns the rows' ids",
    }.items():
        assert f"--trainer.callbacks.{argument} {argument.upper()} {words}" in told


def test_functions_need_no_annotations():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ResMemCallback, "callback")
    for argument, function in {"targets_fn": odd_targets, "ids_fn": odd_targets, "forward_fn": run_odd}.items():
        found = parser.parse_args([f"--callback.{argument}={__name__}.{function.__name__}"])
        assert found.callback[argument] is function


def number(printed, name):
    """The value that the trainer's table shows for a metric."""
    (found,) = re.findall(rf"{re.escape(name)}\W+([\d.]+)", printed)
    return float(found)


@pytest.mark.slow
def test_fit_then_test_then_memorize_then_tune(resmem, tmp_path):
    """One config for all commands, each as a user would start it: nothing is shared but the files."""
    config = ("--config", CONFIG)
    assert resmem("fit", *config, "--trainer.max_epochs=1")[0] == 0
    checkpoint = Path("outputs/digits/checkpoints/last.ckpt")
    first = LocalMemory.load("outputs/digits/resmem")
    assert len(first) == 1000

    data, base = Digits(), Classifier()
    data.setup("test")
    base.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    inputs, targets = data.test.tensors

    def scores(memory):
        predictions = ResMemModule(base, memory).predictions((inputs, targets))
        return {name: float((part.argmax(1) == targets).float().mean()) for name, part in predictions._asdict().items()}

    status, out, _ = resmem("test", *config, "--ckpt_path", checkpoint)
    assert status == 0
    for name, value in scores(first).items():
        assert number(out, f"test/acc_{name}") == pytest.approx(value, abs=1e-6)
    assert scores(first)["resmem"] > scores(first)["base"]

    shutil.rmtree("outputs/digits/resmem")
    status, out, _ = resmem("memorize", *config, "--ckpt_path", checkpoint)
    assert status == 0
    assert f"1000 rows to {tmp_path / 'outputs' / 'digits' / 'resmem'}" in out
    again = LocalMemory.load("outputs/digits/resmem")
    assert again.params == first.params
    assert again.provenance == first.provenance
    assert torch.equal(again.fetch(again.ids).targets, first.fetch(first.ids).targets)

    tuner = ("--tuner=lightning_resmem.GridTuner", "--tuner.k=[3]")
    status, out, _ = resmem("tune", *config, "--ckpt_path", checkpoint, *tuner)
    assert status == 0
    assert LocalMemory.load("outputs/digits/resmem").params.k == 3
    assert "on 300 validation rows" in out


@pytest.fixture
def trainer(tmp_path):
    return ResMemTrainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_progress_bar=False)


def test_missing_files_are_named(trainer, tmp_path):
    with pytest.raises(InputError, match=r"ckpt_path='gone\.ckpt'"):
        trainer.memorize(Classifier(), Digits(), ckpt_path="gone.ckpt")
    with pytest.raises(StorageError, match="no such directory"):
        trainer.tune(Classifier(), Digits(), directory=str(tmp_path / "elsewhere"))


def test_tune_refuses_other_weights(trainer, tmp_path):
    directory = str(tmp_path / "memory")
    trainer.callbacks.append(ResMemCallback(tuner=None))  # tuning takes seconds
    trainer.memorize(Classifier(), Digits(), directory)
    params = LocalMemory.load(directory).params
    with pytest.raises(StaleMemoryError):
        trainer.tune(Classifier(), Digits(), directory)
    assert LocalMemory.load(directory).params == params


def test_memorize_reads_batches_as_the_callback_is_told_to(trainer, tmp_path):
    rows = itertools.count(5000)
    trainer.callbacks.append(ResMemCallback(ids_fn=lambda batch: [next(rows) for _ in batch[1]]))
    trainer.memorize(Classifier(), Digits(), str(tmp_path / "memory"))
    assert LocalMemory.load(tmp_path / "memory").ids.min() >= 5000


# -- what the callback's config says


class Odd(Classifier):
    """Its batches need a targets_fn and a forward_fn, and its head a name: it is not the last linear layer."""

    def __init__(self):
        super().__init__()
        self.after = torch.nn.Linear(10, 10)

    def forward(self, scale, x):
        raise AssertionError("not without a forward_fn")

    def validation_step(self, batch):
        raise AssertionError("not needed")


def run_odd(model, batch):
    outputs = model.head(model.body(batch[0]))
    model.after(outputs)
    return outputs


def odd_targets(batch):
    return 9 - batch[1]


def told(tmp_path):
    """A callback that is told as much as there is to tell."""
    rows = Digits()
    rows.setup("fit")
    few = torch.utils.data.Subset(rows.train, range(100, 300))
    return ResMemCallback(
        memory=LocalMemory(params=ResMemParams(k=3), key_dtype=torch.float16),
        tuner=GridTuner(k=[7], sigma=[0.5], softmax_temperature=[1.0], strength=[1.0]),
        head="head",
        embedding="body.0",
        targets_fn=odd_targets,
        forward_fn=run_odd,
        memory_dataloader=torch.utils.data.DataLoader(few, batch_size=50),
        dirpath=tmp_path / "here",
    )


def test_memorize_does_what_the_callback_is_told(trainer, tmp_path):
    trainer.callbacks.append(told(tmp_path))
    model, data = Odd(), Digits()
    trainer.memorize(model, data)
    memory = LocalMemory.load(tmp_path / "here")
    data.setup("fit")
    inputs, targets = data.train[100:300]
    assert len(memory) == 200
    assert memory.params.k == 7
    assert {name: memory.provenance[name] for name in ("head", "embedding")} == {"head": "head", "embedding": "body.0"}
    found = memory.search(model.body[0](inputs).detach(), k=1)
    assert torch.equal(found.ids[:, 0], torch.arange(200))
    assert torch.equal(memory.fetch(memory.ids).targets, 9 - targets)


def test_tune_does_what_the_callback_is_told(trainer, tmp_path):
    callback, data = told(tmp_path), Digits()
    data.setup("fit")
    model, (inputs, targets) = Odd(), data.train[100:300]
    memory = LocalMemory(params=ResMemParams(k=3))
    outputs = model.head(model.body(inputs)).detach()
    memory.add(model.body[0](inputs).detach(), outputs, 9 - targets)
    memory.save(tmp_path / "here")  # filled by hand: it knows neither head nor embedding
    trainer.callbacks.append(callback)
    trainer.tune(model, data)
    assert LocalMemory.load(tmp_path / "here").params.k == 7


def test_each_callback_of_the_config_is_served_under_its_name(trainer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hidden = ResMemCallback(tuner=None, name="hidden", embedding="body.0", route=False)
    trainer.callbacks += [ResMemCallback(tuner=None), hidden]
    model, data = Classifier(), Digits()
    with pytest.raises(InputError, match=r"directory='one' is for one memory.*\(resmem, hidden\)"):
        trainer.memorize(model, data, "one")
    trainer.memorize(model, data)
    memories = {name: LocalMemory.load(name) for name in ("resmem", "hidden")}
    assert "embedding" not in memories["resmem"].provenance
    assert memories["hidden"].provenance["embedding"] == "body.0"
    trainer.tune(model, data, tuner=GridTuner(k=[4], sigma=[0.4], softmax_temperature=[1.0]))
    assert [LocalMemory.load(name).params.k for name in memories] == [4, 4]
    # ... and where these commands save by default is where the others look.
    _use_saved(trainer)
    (logged,) = trainer.test(model, datamodule=data, verbose=False)
    assert {"test/acc_resmem", "test/hidden/acc_resmem"} <= set(logged)


# -- what is replaced, and what is not


def test_memorize_replaces_a_memory_only_if_told_to(trainer, tmp_path):
    trainer.callbacks.append(ResMemCallback(dirpath=tmp_path / "memory", tuner=None))
    trainer.memorize(Classifier(), Digits())
    good = LocalMemory.load(tmp_path / "memory").provenance
    with pytest.raises(StorageError, match=r"holds a memory: it is left as it is. Give --overwrite"):
        trainer.memorize(Classifier(), Digits())
    assert LocalMemory.load(tmp_path / "memory").provenance == good
    trainer.memorize(Classifier(), Digits(), overwrite=True)
    assert LocalMemory.load(tmp_path / "memory").provenance != good


def test_memorize_without_a_checkpoint_says_what_the_weights_are(trainer, tmp_path):
    trainer.callbacks.append(ResMemCallback(tuner=None))
    with pytest.warns(ResMemWarning, match="Without --ckpt_path"):
        trainer.memorize(Classifier(), Digits(), str(tmp_path / "memory"))


def test_memorize_and_tune_load_checkpoints_as_the_trainer_does(trainer, tmp_path):
    class Late(Classifier):
        """Makes its head when it is configured."""

        def __init__(self):
            super().__init__()
            self.head = None

        def configure_model(self):
            self.head = torch.nn.Linear(16, 10) if self.head is None else self.head

    model = Late()
    model.configure_model()
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "model.ckpt")
    directory, checkpoint = str(tmp_path / "memory"), str(tmp_path / "model.ckpt")
    trainer.callbacks.append(ResMemCallback(tuner=None))
    trainer.memorize(Late(), Digits(), directory, checkpoint)
    assert LocalMemory.load(directory).provenance["fingerprint"] == fingerprint(model)
    trainer.tune(Late(), Digits(), directory, checkpoint, tuner=GridTuner(k=[4], sigma=[0.4]))
    assert LocalMemory.load(directory).params.k == 4


@pytest.mark.slow
def test_memorize_needs_overwrite_on_the_command_line(resmem, tmp_path):
    settings = yaml.safe_load(Path(CONFIG).read_text())
    settings["trainer"]["callbacks"][0]["init_args"]["tuner"] = None  # tuning takes seconds
    (tmp_path / "untuned.yaml").write_text(yaml.safe_dump(settings))
    config = ("memorize", "--config", "untuned.yaml", "--trainer.accelerator=cpu", "--trainer.logger=false")
    assert resmem(*config)[0] == 0
    before = LocalMemory.load("outputs/digits/resmem").provenance
    status, _, err = resmem(*config, "--seed_everything=1")
    assert status == 1
    assert "Give --overwrite=true to replace it" in err
    assert LocalMemory.load("outputs/digits/resmem").provenance == before
    assert resmem(*config, "--seed_everything=1", "--overwrite=true")[0] == 0
    assert LocalMemory.load("outputs/digits/resmem").provenance != before
