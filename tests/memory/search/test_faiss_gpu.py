"""A FAISS that would end this process on a GPU is tried in another, and named."""

import pytest
import torch

from lightning_resmem import InputError
from lightning_resmem.memory.search import faiss_gpu

ABORTS = "import os, sys; print('no kernel image is available', file=sys.stderr, flush=True); os.abort()"
FAILS = "raise RuntimeError('all CUDA-capable devices are busy or unavailable')"


def test_a_wheel_without_code_for_the_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_gpu, "_PROGRAM", ABORTS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(InputError, match=r"'IVF8,Flat' .*NVIDIA H100.*9\.0.*no kernel image is available.*exact"):
        faiss_gpu.check_gpu(torch.device("cuda", 1), "IVF8,Flat")


def test_an_error_is_left_to_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_gpu, "_PROGRAM", FAILS)
    faiss_gpu.check_gpu(torch.device("cuda"), "Flat")
