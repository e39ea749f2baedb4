"""Triton: the rows of a decode step from the cache's clock, in one program."""

from __future__ import annotations

import torch

from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import check_device, jit, tl
from ..storage.triton_window import first_held


@jit
def _rows_kernel(
    clock_ptr, table_ptr, pads_ptr, out_ptr, batch, most, window, places,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """begin, end and k_eff of every row; ``most`` is the last entry of the table."""
    b = tl.arange(0, BLOCK)
    inside = b < batch
    end = tl.load(clock_ptr)
    begin = tl.zeros((BLOCK,), tl.int32)
    if PADDED:
        begin = tl.load(pads_ptr + b, mask=inside, other=0)
    begin = tl.maximum(begin, tl.where(window > 0, end - window, 0))
    begin = tl.minimum(tl.maximum(begin, 0), end)
    k_eff = tl.load(table_ptr + tl.minimum(end - begin, most), mask=inside, other=0)
    if places > 0:
        first = first_held(end, window, places)
        begin = begin - first
        end = end - first
    row = out_ptr + b * 4
    tl.store(row, begin, mask=inside)
    tl.store(row + 1, begin * 0 + end, mask=inside)
    tl.store(row + 2, k_eff, mask=inside)
    tl.store(row + 3, begin * 0, mask=inside)


def write(
    out: torch.Tensor, clock: torch.Tensor, table: torch.Tensor, pads: torch.Tensor | None, window: int, places: int
) -> None:
    """As :func:`qaxis.decode.rows.write_rows`, of arguments that were checked."""
    check_device("out", out)
    batch = out.shape[0]
    with torch.cuda.device_of(out):
        _rows_kernel[(1,)](
            clock, table, clock if pads is None else pads, out, batch, len(table) - 1, window, places,
            PADDED=pads is not None, BLOCK=next_power_of_two(batch),
        )  # fmt: skip
