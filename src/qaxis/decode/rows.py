"""What every row of a batch sees of its keys, and how many it keeps: read by the kernels, from device memory."""

from __future__ import annotations

import torch

#: columns of rows, int32 ``[B, 4]``: places [begin, end) are visible, ``k_eff`` of them are kept; the last is unused
BEGIN, END, K_EFF = 0, 1, 2


def fixed_rows(batch: int, n: int, k_eff: int, device: torch.device | str) -> torch.Tensor:
    """Rows int32 ``[B, 4]`` that all see ``n`` keys and keep ``k_eff`` of them."""
    return torch.tensor([0, n, k_eff, 0], dtype=torch.int32).repeat(batch, 1).to(device)
