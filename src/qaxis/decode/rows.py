"""Which keys each batch row sees and how many it keeps, in device memory: int32 ``[B, 4]``.

A row sees the places [begin, end) of its keys and keeps k_eff of them. Written from the cache's clock, so that a
captured graph serves a cache that grows. The fourth column is unused; it makes a row one load of 16 bytes.
"""

from __future__ import annotations

import torch

from ..storage.window import first_held
from ..validation import check_memory, is_integer, require

#: columns
BEGIN, END, K_EFF = 0, 1, 2
COLUMNS = 4


def fixed_rows(batch: int, n: int, k_eff: int, device: torch.device | str) -> torch.Tensor:
    """Rows that see all ``n`` keys and keep ``k_eff`` of them, int32 ``[batch, 4]``."""
    return torch.tensor([[0, n, k_eff, 0]] * batch, dtype=torch.int32, device=device)


def write_rows(
    out: torch.Tensor,
    clock: torch.Tensor,
    table: torch.Tensor,
    pads: torch.Tensor | None = None,
    window: int = 0,
    places: int = 0,
) -> None:
    """Write what each row sees at the clock's end and keeps; one launch on a GPU, and nothing waits for the device.

    Args:
        out: int32 ``[B, 4]``, contiguous.
        clock: int32 ``[1]``, tokens in the cache (:class:`~qaxis.storage.clock.Clock`).
        table: int32 ``[T + 1]``, keys kept of 0 to T visible ones; more than T count as T.
        pads: int32 ``[B]``, tokens at the start that a row does not see, or None.
        window: newest tokens that are seen, 0 for all.
        places: of the buffer of a layer with a window (:mod:`qaxis.storage.window`): the rows name places in it. 0: a
            token's place is its number.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(out, clock, table, pads, window, places)
    if out.is_cuda:
        from .rows_triton import write

        write(out, clock, table, pads, window, places)
        return
    end = clock.to(torch.int32)
    begin = torch.zeros(len(out), dtype=torch.int32, device=out.device) if pads is None else pads
    if window:
        begin = torch.maximum(begin, end - window)
    begin = begin.clamp(min=0).minimum(end)
    visible = end - begin
    out[:, K_EFF] = table[visible.clamp(max=len(table) - 1).long()]
    first = first_held(end, window, places) if places else torch.zeros_like(end)
    out[:, BEGIN], out[:, END], out[:, K_EFF + 1] = begin - first, (end - first).expand(len(out)), 0


def _check(
    out: torch.Tensor, clock: torch.Tensor, table: torch.Tensor, pads: torch.Tensor | None, window: int, places: int
) -> None:
    batch = out.shape[0] if isinstance(out, torch.Tensor) and out.ndim else 0
    given = {"out": (out, (batch, COLUMNS)), "clock": (clock, (1,)), "pads": (pads, (batch,))}
    for name, (x, shape) in given.items():
        if x is not None:
            check_memory(name, x)
            require(tuple(x.shape) == shape, f"{name}.shape", tuple(x.shape), f"{shape}")
    check_memory("table", table)
    require(table.ndim == 1 and len(table) > 0, "table.shape", tuple(table.shape), "[T + 1]")
    for name, x in (("out", out), ("clock", clock), ("table", table), ("pads", pads)):
        if x is not None:
            require(x.dtype == torch.int32, f"{name}.dtype", x.dtype, "torch.int32")
            require(x.is_contiguous(), f"{name}.stride()", x.stride(), "a contiguous tensor")
            require(x.device == out.device, f"{name}.device", str(x.device), f"out's {out.device}")
    require(is_integer(window) and window >= 0, "window", window, "0, or a number of tokens")
    fits = is_integer(places) and (places == 0 or 0 < window <= places)
    require(fits, "places", places, f"0, or at least the window's {window} places")
