"""The selection of select.cu, or None where it does not run and the Triton kernels do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..cuda.compiler import ELEMENTS, SHARED_LIMIT, compiled, in_16_bytes, readable, runs_on

SOURCE = Path(__file__).with_name("select.cu")
#: keys whose scores a warp keeps in shared memory, so that three rows fit on a multiprocessor
MOST = 32768


def row_selector(
    q: torch.Tensor, k: torch.Tensor, visible: int, capacity: int, slack: int
) -> tuple[Any, int, int, int] | None:
    """For queries that see ``visible`` keys: the kernel, 1024s of keys it looks at, warps, bytes shared; or None."""
    dim = q.shape[3]
    if visible > MOST or not runs_on(q.device, (8, 0)) or not readable(in_16_bytes(q), (dim,), q, k):
        return None
    room = -(-visible // 1024)
    # As in select.cu.
    each = room * 2176 + capacity * 4 + 16
    warps = 4 if 12 * each <= SHARED_LIMIT else 1
    kernel = compiled(
        SOURCE, "select_rows", SHARED_LIMIT if warps == 1 else SHARED_LIMIT // 3 // 16 * 16, q.device,
        elem=ELEMENTS[q.dtype], dim=dim, group=q.shape[1] // k.shape[1], capacity=capacity, slack=slack, warps=warps,
    )  # fmt: skip
    return None if kernel is None else (kernel, room, warps, warps * each)
