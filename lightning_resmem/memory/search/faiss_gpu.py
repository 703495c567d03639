"""Whether FAISS works on a GPU, found out where it can do no harm."""

import functools
import subprocess
import sys

import torch

from lightning_resmem.errors import InputError

# A wheel without code for a card ends the process at the first search, whatever is around it.
_PROGRAM = """
import sys, torch, faiss, numpy as np
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), int(sys.argv[1]), faiss.IndexFlatL2(8))
index.add(np.eye(8, dtype=np.float32))
index.search(np.eye(8, dtype=np.float32), 1)
"""
_SECONDS = 120.0
_SHOWN = 300  # characters of what the process said last


def check_gpu(device: torch.device, factory: str) -> None:
    """Raise an error if a search with FAISS on a GPU would end this process; found out once for each GPU.

    Args:
        device: The GPU.
        factory: What is to be built, for the message.

    Raises:
        InputError: That names the card and what FAISS said.
    """
    said = _last_words(device.index or 0, _PROGRAM)
    if said is not None:
        major, minor = torch.cuda.get_device_capability(device)
        raise InputError(
            f"index={factory!r} cannot be searched on {torch.cuda.get_device_name(device)}: this build of faiss-gpu "
            f"ends the process that tries, as those without code for a card do (its compute capability is {major}."
            f'{minor}). It said: {said} Use index="exact", which needs no FAISS, another faiss-gpu, or keep the memory '
            "on the CPU."
        )


@functools.cache
def _last_words(gpu: int, program: str) -> str | None:
    """What a process that tries a GPU says before it dies; None if it lives, or fails with an error of Python's.

    An error can be told where it happens: the GPU may be one that a single process at a time may use.
    """
    command = [sys.executable, "-c", program, str(gpu)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nothing for {_SECONDS:.0f} s."
    if done.returncode in (0, 1):
        return None
    return " ".join(done.stderr.split())[-_SHOWN:] or f"nothing (exit code {done.returncode})."
