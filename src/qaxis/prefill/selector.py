"""The selection of select.cu, or None where it does not run and the Triton kernels do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..canonical import next_power_of_two
from ..native.compiler import ELEMENTS, compiled

SOURCE = Path(__file__).with_name("select.cu")
#: keys whose scores a warp keeps in registers
MOST = 8192


def row_selector(q: torch.Tensor, k: torch.Tensor, visible: int, capacity: int) -> tuple[Any, int] | None:
    """The kernel of select.cu for queries that see ``visible`` keys, and the 256s of keys it looks at; else None."""
    each, dim = 4 if q.dtype == torch.float32 else 8, q.shape[3]
    if visible > MOST or (q.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(q.device) < (8, 0))):
        return None
    ok = dim & (dim - 1) == 0 and 2 * each <= dim <= 32 * each
    for x in (q, k):
        ok = ok and x.stride(3) == 1 and x.data_ptr() % 16 == 0
        ok = ok and all(s % each == 0 and s // each < 1 << 31 for s in x.stride()[:3])
    if not ok:
        return None
    chunks = max(4, next_power_of_two(-(-visible // 256)))
    kernel = compiled(
        SOURCE, "select_rows", 0, q.device, elem=ELEMENTS[q.dtype], dim=dim, chunks=chunks, capacity=capacity
    )
    return None if kernel is None else (kernel, chunks)
