"""Python as a user starts it, but with the libraries loaded: to import them takes longer than most of what tests do."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_servers: list[tuple[subprocess.Popen[bytes], Connection]] = []


class Finished(NamedTuple):
    """An interpreter that ended: how, what it wrote, after how long, and the processes that it left running."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    left: list[int]

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run_python(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, seconds: float = 150.0
) -> Finished:
    """Run `python ARGUMENTS` until it and all that it started have ended; see `warm_interpreter.py`.

    Tests of what is imported, or of how long that takes, start an interpreter themselves instead.

    Args:
        arguments: A script, `-c CODE` or `-m MODULE`, and what it is given.
        cwd: The directory to run in, by default this process's.
        env: The environment, by default this process's. This repository is put into its PYTHONPATH.
        seconds: How long it may take.
    """
    environment = dict(os.environ if env is None else env)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    connection = _server()[1]
    with tempfile.TemporaryDirectory() as directory:
        stdout, stderr = Path(directory, "stdout"), Path(directory, "stderr")
        started = time.monotonic()
        connection.send(([*map(str, arguments)], str(cwd or Path.cwd()), environment, str(stdout), str(stderr)))
        pid: int = connection.recv()
        in_time = connection.poll(seconds)
        if not in_time:
            os.killpg(pid, signal.SIGKILL)
        code: int = connection.recv()
        while (left := _processes_of(pid)) and time.monotonic() < started + seconds:
            time.sleep(0.02)
        took = time.monotonic() - started
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        finished = Finished(code, stdout.read_text(errors="replace"), stderr.read_text(errors="replace"), took, left)
    assert in_time, f"{arguments} was still running after {seconds} s:\n{finished.output[-4000:]}"
    return finished


def server_pid() -> int | None:
    """The process whose forks those interpreters are, if there is one; it ends with this one."""
    return _servers[0][0].pid if _servers else None


def _server() -> tuple[subprocess.Popen[bytes], Connection]:
    if not _servers:
        ours, theirs = Pipe()
        # Libraries that are imported with one thread start none, which a fork would lose.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        environment.pop("PYTHONPATH", None)
        command = [sys.executable, str(ROOT / "tests" / "warm_interpreter.py"), str(theirs.fileno())]
        server = subprocess.Popen(
            command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        _servers.append((server, ours))
    return _servers[0]


def _processes_of(process_group: int) -> list[int]:
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == process_group and fields[0] != "Z":
                left.append(int(entry.name))
    return left
