"""What a model does to a score before the softmax; none of it changes the order of the keys (paper, section 2).

The canonical form of it is ``logits_of`` in ``reference.py``; :meth:`Logits.softmax` is for what need not be that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Real

import torch

from ..validation import check_form, check_scale, require

#: soft caps: prefill's kernels take the cap times log2(e) and the scale divided by it, both in float32
LEAST_CAP, MOST_CAP = 1e-30, 1e30


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

    def of(self, scores: torch.Tensor) -> torch.Tensor:
        """Logits of raw scores, by PyTorch: not canonical."""
        logits = scores * self.scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def softmax(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Weights ``[B, H, M, N]`` of raw scores over the ``visible`` keys, by PyTorch: not canonical.

        A query that sees no key gets NaN without a sink.
        """
        logits = torch.where(visible, self.of(scores), -torch.inf)
        if self.sink is None:
            return torch.softmax(logits, -1)
        extra = self.sink.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]


def checked_logits(
    logits: Logits | None, scale: float | None, heads: int, head_dim: int, device: torch.device
) -> Logits:
    """``logits``, or those of ``scale`` alone, in a form that every kernel takes; the sink's numbers are not looked at.

    Args:
        scale: softmax scale, None is ``1/sqrt(head_dim)``; None as well beside ``logits``.
        heads, device: of the queries; a sink is ``[heads]``, float32, float16 or bfloat16, there.

    Raises:
        ValueError: if both are given, or naming the argument, its value and what is allowed.
    """
    if logits is None:
        return Logits(check_scale(scale, head_dim))
    require(isinstance(logits, Logits), "logits", type(logits).__name__, "a qaxis.attention.logits.Logits or None")
    require(scale is None, "scale", scale, "None beside logits, which have a scale")
    logits = replace(logits, scale=check_scale(logits.scale, head_dim))
    cap, sink = logits.soft_cap, logits.sink
    real = isinstance(cap, Real) and not isinstance(cap, bool)
    allowed = cap is None or (real and LEAST_CAP <= cap <= MOST_CAP)
    require(allowed, "logits.soft_cap", cap, f"None, or a number in {LEAST_CAP:g}..{MOST_CAP:g}")
    if sink is not None:
        check_form("logits.sink", sink, 1)
        require(sink.shape[0] == heads, "logits.sink.shape", tuple(sink.shape), f"({heads},): one a head")
        require(sink.device == device, "logits.sink.device", str(sink.device), f"the queries' {device}")
    return logits
