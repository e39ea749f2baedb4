"""The selection of select.cu, or None where it does not run and the Triton kernels do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..canonical import next_power_of_two
from ..native.compiler import ELEMENTS, compiled, in_16_bytes, readable, runs_on

SOURCE = Path(__file__).with_name("select.cu")
#: keys whose scores a warp keeps in registers
MOST = 8192


def row_selector(q: torch.Tensor, k: torch.Tensor, visible: int, capacity: int) -> tuple[Any, int] | None:
    """The kernel of select.cu for queries that see ``visible`` keys, and the 256s of keys it looks at; else None."""
    dim = q.shape[3]
    if visible > MOST or not runs_on(q.device, (8, 0)) or not readable(in_16_bytes(q), (dim,), q, k):
        return None
    chunks = max(4, next_power_of_two(-(-visible // 256)))
    kernel = compiled(
        SOURCE, "select_rows", 0, q.device, elem=ELEMENTS[q.dtype], dim=dim, chunks=chunks, capacity=capacity
    )
    return None if kernel is None else (kernel, chunks)
