"""An interpreter that has imported the libraries and done nothing else; for `interpreters.py`, which starts it.

Each call is a fork that becomes `python ARGUMENTS`: with the environment, the directory, the path, the `__main__` and
the end of an interpreter that was just started, in a session of its own.
"""

import contextlib
import gc
import importlib
import os
import runpy
import sys
from multiprocessing.connection import Connection
from types import ModuleType

# Not wandb: the directory that it makes when it is imported is deleted by the first fork that ends.
LOADED = (
    "lightning.pytorch",
    "lightning_resmem.callback",
    "matplotlib.pyplot",
    "psutil",
    "rich.progress",
    "sklearn.datasets",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchmetrics",
)


def next_call(calls: Connection) -> list[str]:
    """In a fork, which is set up, the arguments of a call; the process itself answers calls until there are no more."""
    while True:
        try:
            arguments, cwd, environment, *files = calls.recv()
        except EOFError:
            raise SystemExit from None
        pid = os.fork()
        if pid == 0:
            calls.close()
            set_up(cwd, environment, files)
            return arguments
        calls.send(pid)
        calls.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def set_up(cwd: str, environment: dict[str, str], files: list[str]) -> None:
    """What an interpreter finds when it starts; stdout and stderr are those files."""
    import torch

    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in enumerate(files, start=1):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


def run(arguments: list[str]) -> None:
    """Run a script, `-c CODE` or `-m MODULE` as `__main__`."""
    match arguments:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(code, "<string>", "exec"), main.__dict__)
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, os.path.dirname(script))
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    sys.path[0] = os.getcwd()  # the repository, not this directory
    for name in LOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    del sys.path[0]
    gc.freeze()
    run(next_call(connection))
