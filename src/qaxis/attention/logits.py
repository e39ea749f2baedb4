"""What a model does to a score before the softmax; none of it changes the order of the keys (paper, section 2).

The canonical form of it is ``weighted_sum`` in ``reference.py``; :meth:`Logits.softmax` is for what need not be that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Logits:
    """From raw scores <q, k> to logits.

    Attributes:
        scale: positive factor of every score.
        soft_cap: logits become ``soft_cap * tanh(logit / soft_cap)`` (Gemma 2), or None.
        sink: ``[H]``, a logit per head that takes part in the denominator and has no value (gpt-oss), or None.
    """

    scale: float
    soft_cap: float | None = None
    sink: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are scaled scores, nothing else."""
        return self.soft_cap is None and self.sink is None

    def softmax(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Weights ``[B, H, M, N]`` of raw scores over the ``visible`` keys, by PyTorch: not canonical.

        A query that sees no key gets NaN without a sink.
        """
        logits = scores * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        logits = torch.where(visible, logits, -torch.inf)
        if self.sink is None:
            return torch.softmax(logits, -1)
        extra = self.sink.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]
