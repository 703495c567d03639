"""Which command was given, and what becomes of its errors."""

import importlib.util
import sys

from lightning_resmem import __version__
from lightning_resmem.cli import saved
from lightning_resmem.cli.options import TRAINING, parser
from lightning_resmem.errors import InputError, ResMemError

_SAVED = {"stats": saved.stats, "inspect": saved.inspect, "convert": saved.convert}
# What is not for LightningCLI, which takes options before the subcommand, too (`resmem --config digits.yaml fit`).
_OPTIONS = ("-h", "--help", "--version", "--print-completion")


def main() -> int:
    """Run the command that the command line gives.

    Returns:
        The exit status: 0, or 1 after an error, which is told in one message. Wrong options end the process with 2.
    """
    debug = sys.argv[1:2] == ["--debug"]
    if debug:
        del sys.argv[1]
    try:
        _run(sys.argv[1:])
    except ResMemError as error:
        if debug:
            raise
        sys.stderr.write("\n".join([f"resmem: {error}", *getattr(error, "__notes__", [])]) + "\n")
        return 1
    return 0


def _run(arguments: list[str]) -> None:
    word = arguments[0] if arguments else ""
    if word in TRAINING or (word.startswith("-") and word.partition("=")[0] not in _OPTIONS):
        _train()
        return
    options = parser()
    if word not in _SAVED and not word.startswith("-"):
        problem = f"{word!r} is no subcommand" if word else "a subcommand is missing"
        options.error(f"{problem}: give one of {', '.join([*TRAINING, *_SAVED])}, or --help.")
    given, unknown = options.parse_known_args(arguments)
    if unknown:
        getattr(given, "refuse", options.error)(f"unrecognized arguments: {' '.join(unknown)}")
    if given.version:
        sys.stdout.write(f"{__version__}\n")
    elif given.print_completion:
        _print_completion(given.print_completion)
    else:
        _SAVED[given.command](given)


def _train() -> None:
    if importlib.util.find_spec("jsonargparse") is None:
        raise InputError(
            'resmem needs jsonargparse, for all but inspect, stats and convert: pip install "lightning-resmem[cli]".'
        )
    from lightning_resmem.cli.training import run_lightning

    run_lightning()


def _print_completion(shell: str) -> None:
    if importlib.util.find_spec("shtab") is None:
        raise InputError('--print-completion needs shtab: pip install "lightning-resmem[cli]".')
    import shtab

    sys.stdout.write(f"{shtab.complete(parser(), shell)}\n")
