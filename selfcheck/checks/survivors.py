"""What the certified step scores canonically of a model's own keys, and what codes of fewer bits could rule out."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

import qaxis
from qaxis.arithmetic.rounding import product_error_bound

from ..harness.claim import Context, Result, value
from ..inputs.capture import Captured, capture, first_middle_last
from ..rivals import approximate_decoding
from . import doors
from .certified import ways

LENGTHS = (512, 1024, 2048, 4096, 8192)
BITS = {"four": 4, "eight": 8}


def _not_ruled_out(q: torch.Tensor, k: torch.Tensor, k_eff: int, bits: int) -> float:
    """Share of the keys that codes of so many bits cannot rule out, scales per channel over 128 tokens, float64."""
    n = k.shape[2] // 128 * 128
    x = k[:, :, :n].double().unflatten(2, (-1, 128))
    largest = 2 ** (bits - 1) - 1
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(3, keepdim=True).clamp(min=1e-30) / largest)))
    near = (torch.round(x / scale).clamp(-largest - 1, largest) * scale).flatten(2, 3)
    left_out = (k[:, :, :n].double() - near).norm(dim=-1)
    group = q.shape[1] // k.shape[1]
    near, left_out = near.repeat_interleave(group, 1), left_out.repeat_interleave(group, 1)
    fast = (q.double() @ near.transpose(-1, -2))[:, :, 0]
    # Each key by its own residual: tighter than what the kernels keep, so this flatters the codes if anything.
    error = q.double().norm(dim=-1) * left_out + product_error_bound(q, k)[:, :, 0].double()
    kth = (fast - error).topk(min(k_eff, n), dim=-1).values[..., -1:]
    return float((fast + error >= kth).float().mean())


@dataclass
class _Found:
    """Over all layers and lengths."""

    wrong: int = 0
    compared: int = 0
    by_cuda: int = 0
    recall: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def row(self, captured: list[Captured], n: int, longest: bool) -> dict[str, Any]:
        """Shares of the keys in per cent, mean over layers, of contexts of ``n``."""
        shares: dict[str, list[float]] = defaultdict(list)
        k_eff = qaxis.Budget().k_eff(n)
        steps: dict[str, Any] = {}
        #: of every row, what the fastest step that runs here rescored behind codes
        ran: list[torch.Tensor] = []
        for _, *whole in captured:
            q, k, v = (x.to(torch.bfloat16) for x in whole)
            q, k, v = q[:, :, n - 1 : n].contiguous(), k[:, :, :n].contiguous(), v[:, :, :n].contiguous()
            exact = qaxis.topk_attention(q, k, v, k_eff)
            here = torch.zeros(0)
            for (way, keys, values, index), (by, maker) in itertools.product(
                list(itertools.islice(ways(k, v), 2)), doors.STEPS.items()
            ):
                if by not in steps:
                    steps[by] = maker(1, q.shape[1], n, q.shape[3], k_eff, q.device)
                if by == "CUDA" and steps[by].cuda_step(q, keys, values, index) is None:
                    continue
                step = steps[by](q, keys, values, index)
                self.wrong += int((step.indices != exact.indices).any(-1).sum())
                self.compared += q.shape[1]
                self.by_cuda += q.shape[1] if by == "CUDA" else 0
                # The CUDA step comes last, and has a rule of its own: bounds of each group of codes. Of keys without
                # codes it scores all.
                share = step.rescored.float().sum(-1).flatten() / n
                if by == "Triton":
                    shares[way].append(float(share.mean()))
                if way == "codes":
                    here = share
            ran.append(here)
            for name, bits in BITS.items():
                shares[name].append(_not_ruled_out(q, k, k_eff, bits))
            for rival in approximate_decoding.ways(k, k_eff) if longest else ():
                self.recall[rival.name].append(approximate_decoding.recall(rival.choose(q), exact.indices))
        every = torch.cat(ran)
        shares["codes_step"], shares["codes_step_p95"] = [float(every.mean())], [float(every.quantile(0.95))]
        return {"n": n, "k_eff": k_eff, **{name: 100 * statistics.mean(x) for name, x in shares.items()}}


@torch.inference_mode()
def survivors(context: Context) -> Result:
    """Shares of the keys by length, and the recall of approximate ways at the longest."""
    full = LENGTHS[0] if context.quick else LENGTHS[-1]
    lengths = [n for n in LENGTHS if n <= full]
    model, found = context.subjects.model, _Found()
    captured = capture(model, context.texts(1, full)[0])
    rows = [found.row(captured, n, n == full) for n in context.progress(lengths, "lengths")]
    last = rows[-1]
    return Result(
        passed=found.wrong == 0,
        verdict=f"{found.wrong} of {found.compared} sets differ",
        headline=f"N = {full}: {last['codes']:.1f} % rescored behind 8-bit codes; 4 bits leave {last['four']:.1f} %",
        values={
            "wrong": value(found.wrong, "sets"),
            "layers": value(len(captured), "layers"),
            "sets": value(found.compared, "sets"),
            "by_cuda": value(found.by_cuda, "sets"),
            **{f"{name}_share": value(last[name], "% of the keys") for name in ("codes", "four", "keys", "codes_step")},
            "codes_p95": value(last["codes_step_p95"], "% of the keys"),
        },
        cases=found.compared,
        data={
            "rows": rows,
            "recall": {name: statistics.mean(x) for name, x in found.recall.items()},
            "layers": list(first_middle_last(model)),
        },
        checks=[f"N={n}, {name}" for n in lengths for name in ("keys", "codes")],
    )
