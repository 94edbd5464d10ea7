"""Page-locks the parcel arena for a GPU: only such memory is copied to while kernels run."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger(__name__)

SUCCESS = 0


def pin(memory: memoryview) -> None:
    """Registers host memory with CUDA. Without it copies still work, but the model thread waits for them."""
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    error = int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0))
    if error != SUCCESS:
        log.warning("the arena could not be page-locked (CUDA error %d): prefill waits for its copies", error)
