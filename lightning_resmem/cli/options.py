"""The commands and the options they take, for parsing, `--help` and the completion of shells."""

import argparse
from typing import Any

# The subcommands that LightningCLI makes, whose options come from the signatures of Python objects.
TRAINING = {
    "fit": "train; then fill, tune and save the memory",
    "validate": "evaluate base, knn and resmem on the validation rows",
    "test": "evaluate base, knn and resmem on the test rows",
    "predict": "predict with the memory",
    "memorize": "give a model that is trained already a memory, and save it",
    "tune": "tune a saved memory again",
}

# What shells complete a word with, as shtab wants to be told.
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
_DIRECTORY = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}

_DTYPES = ["float32", "float16", "bfloat16"]


def parser() -> argparse.ArgumentParser:
    """All commands. Of those of LightningCLI only what is completed: it parses their options itself."""
    made = argparse.ArgumentParser(
        prog="resmem",
        description="ResMem for PyTorch Lightning: better predictions from a trained network, without retraining it.",
        epilog="`resmem COMMAND --help` explains a command. Exit status: 0; 1 after an error; 2 for wrong options.",
    )
    made.add_argument("--version", action="store_true", help="print the version")
    made.add_argument("--debug", action="store_true", help="before the command: errors with their traceback")
    made.add_argument("--print-completion", choices=["bash", "zsh", "tcsh"], help="print what completes the command")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, help in TRAINING.items():
        command = commands.add_parser(name, help=help, add_help=False)
        _completed(command.add_argument("--config", "-c"), _FILE)
        _completed(command.add_argument("--ckpt_path"), _FILE)
        command.add_argument("--help", "-h", action="store_true")
    _stats(commands)
    _inspect(commands)
    _convert(commands)
    return made


def _stats(commands: Any) -> None:
    command = commands.add_parser(
        "stats",
        help="numbers about a saved memory",
        description="Print what a saved memory holds, from its manifest alone.",
    )
    _memory(command, "directory")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--verify", action="store_true", help="read all files, and compare their checksums")


def _inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="an HTML report of a saved memory",
        description="Write a self-contained HTML report of a saved memory: what it holds, its rows' neighbours, and "
        "likely label errors.",
    )
    _memory(command, "directory")
    output = command.add_argument("--output", help="the HTML file (default: NAME-report.html in the current directory)")
    _completed(output, _FILE)
    command.add_argument("--rows", type=int, default=1000, help="rows whose neighbours are searched (default: 1000)")
    command.add_argument("--k", type=int, default=5, help="neighbours shown of a row (default: 5)")
    command.add_argument("--no-verify", action="store_true", help="do not compare the files' checksums")


def _convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="save a memory with another index or other types, or two memories as one",
        description="Save a memory with another index or other types, or the rows of two memories as one memory. What "
        "is not given stays as it is.",
    )
    _memory(command, "source")
    _completed(command.add_argument("target", help="where the new memory is saved"), _DIRECTORY)
    command.add_argument("--index", help='"exact", "auto", or a FAISS factory string such as HNSW32')
    command.add_argument("--key-dtype", choices=_DTYPES, help="what keys are stored as")
    command.add_argument("--values", choices=["dense", "sparse"], help="outputs in full, or the largest probabilities")
    command.add_argument("--value-dtype", choices=_DTYPES, help="what dense outputs are stored as")
    command.add_argument("--top-m", type=int, help="how many probabilities of a row are sparse values (default: 16)")
    merge = command.add_argument("--merge", metavar="DIRECTORY", help="a memory of the same base whose rows are added")
    _completed(merge, _DIRECTORY)
    command.add_argument(
        "--renumber", action="store_true", help="move the ids of the rows of --merge behind those of SOURCE"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a memory that is there")


def _memory(command: argparse.ArgumentParser, name: str) -> None:
    _completed(command.add_argument(name, help="the saved memory, a path or a URL"), _DIRECTORY)
    command.set_defaults(refuse=command.error)  # with its own usage


def _completed(action: argparse.Action, words: dict[str, str]) -> None:
    action.complete = words  # type: ignore[attr-defined]  # where shtab looks
