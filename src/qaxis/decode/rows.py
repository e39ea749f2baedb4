"""What every batch row of a decode step sees and keeps: numbers in device memory, so that one captured graph serves any."""

from __future__ import annotations

import torch

#: columns of int32 ``[B, 4]``: batch row b sees places [begin, end) and keeps k_eff of them; the last is not used
BEGIN, END, K_EFF = 0, 1, 2


def fixed_rows(batch: int, n: int, k_eff: int, device: torch.device) -> torch.Tensor:
    """Rows that all see ``n`` keys and keep ``k_eff`` of them, int32 ``[batch, 4]``."""
    return torch.tensor([0, n, k_eff, 0], dtype=torch.int32, device=device).repeat(batch, 1)
