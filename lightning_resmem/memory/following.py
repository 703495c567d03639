"""A memory that goes where the model is."""

import torch

from lightning_resmem.memory.capacity import free_bytes
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.search.faiss_index import FaissIndex


def build_near(memory: ResidualMemory, device: torch.device) -> None:
    """Build a memory; on the GPU that a model is on, if it will take no more than half of what is free there.

    Counted are the rows and what a search keeps and takes beside them. A memory stays where it is if it is on a GPU
    already, spread over a cluster, or made for an index of FAISS, of which not all have a GPU version:
    `memory.to("cuda")` moves it.

    Args:
        memory: With its rows.
        device: Of the model.
    """
    with torch.inference_mode(False):  # what is made in inference mode can never be changed again
        if device.type == "cuda" and isinstance(memory, LocalMemory) and memory.device.type == "cpu":
            needed, free = memory.bytes_on(device), free_bytes(device) or 0
            if not isinstance(memory.wanted_index[0], FaissIndex) and needed <= free / 2:
                memory.to(device)
        memory.build()
