"""The canonical arithmetic a third time, in NumPy, sharing no code with the library.

When a platform's bits differ from a committed digest, a digest cannot say where. This can: it is written
from the rules alone (src/qaxis/arithmetic/__init__.py states them) and yields every intermediate result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

F32 = np.float32
COEFFICIENTS = [F32(math.log(2.0) ** j / math.factorial(j)) for j in range(7, -1, -1)]
MAGIC = F32(1.5 * 2**23)


def tree(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis by adjacent pairs, padded with +0.0 to a power of two."""
    size = 1
    while size < x.shape[-1]:
        size *= 2
    x = np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), F32)], -1)
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0] + F32(0)


def exp2(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, F32(-200), F32(200))
    n = (t + MAGIC) - MAGIC
    f = t - n
    p = np.full_like(t, COEFFICIENTS[0])
    for c in COEFFICIENTS[1:]:
        p = p * f + c
    half = np.floor(n / 2).astype(np.int32)
    rest = n.astype(np.int32) - half
    return np.ldexp(np.ldexp(p, half).astype(F32), rest).astype(F32)


def k_eff(coverage: float, minimum: int, n: int) -> int:
    return min(n, max(minimum, math.ceil(Fraction(str(coverage)) * n)))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coverage: float, minimum: int
) -> dict[str, torch.Tensor]:
    """scores (of the last query's selected keys), indices and output of causal attention, scale 1/sqrt(D)."""
    dtype = q.dtype
    (batch, heads, m, dim), (_, kv_heads, n, _) = q.shape, k.shape
    qn, kn, vn = (x.float().numpy() for x in (q, k, v))
    factor = F32(dim**-0.5 * math.log2(math.e))
    width = k_eff(coverage, minimum, n)
    indices = np.full((batch, heads, m, width), -1, np.int64)
    output = np.zeros((batch, heads, m, v.shape[-1]), F32)
    last = np.zeros((batch, heads, 1, width), F32)
    # Products may underflow or meet the edge of the range on purpose.
    with np.errstate(under="ignore", over="ignore"):
        for b in range(batch):
            for h in range(heads):
                keys, values = kn[b, h * kv_heads // heads], vn[b, h * kv_heads // heads]
                for i in range(m):
                    visible = n - m + i + 1
                    score = tree(qn[b, h, i] * keys[:visible])
                    chosen = np.sort(np.argsort(-score, kind="stable")[: k_eff(coverage, minimum, visible)])
                    s = score[chosen]
                    weight = exp2((s - s.max()) * factor)
                    output[b, h, i] = tree(weight * values[chosen].T) / tree(weight)
                    indices[b, h, i, : len(chosen)] = chosen
                last[b, h, 0] = score[chosen]
    return {
        "scores": torch.from_numpy(last), "indices": torch.from_numpy(indices),
        "output": torch.from_numpy(output).to(dtype),
    }  # fmt: skip


#: tokens of a group, of a run; a spread below that share of the second moment counts as none
GROUP, RUN, LEAST = 128, 16, F32(2.0**-12)
#: a sum over keys counts parts, of numbers up to the most; the highest exponent of a weight
PART, MOST, HIGHEST = F32(2.0**-40), F32(2.0**20), F32(12)


@dataclass(frozen=True)
class Setting:
    """What :func:`completed` is told beside tensors and budget.

    Attributes:
        begin: first key that a query sees, an integer or ``[B, M]``; the last one is its own.
        offset: tokens before the first key, which a window dropped; groups and runs count from the first token.
        scale: None is 1/sqrt(D). cap: soft cap of the logits, or None. sink: one logit a head, or None.
    """

    begin: int | np.ndarray = 0
    offset: int = 0
    scale: float | None = None
    cap: float | None = None
    sink: np.ndarray | None = None


def completed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coverage: float, minimum: int, kind: str,
    setting: Setting | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """indices and output of causal attention with what it leaves out put back; kind is "none", "mean" or "linear"."""
    told = setting or Setting()
    (batch, heads, m, _), (_, kv_heads, n, _) = q.shape, k.shape
    qn, kn, vn = (x.float().numpy() for x in (q, k, v))
    begins = np.broadcast_to(np.asarray(told.begin), (batch, m))
    most = max(0, int((np.arange(n - m, n) + 1 - begins).max()))
    indices = np.full((batch, heads, m, k_eff(coverage, minimum, most)), -1, np.int64)
    output = np.zeros((batch, heads, m, v.shape[-1]), F32)
    groups: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}
    # Of numbers at the edge of the range, moments overflow on purpose.
    with np.errstate(all="ignore"):
        for b, h, i in np.ndindex(batch, heads, m):
            g, begin, end = h * kv_heads // heads, int(begins[b, i]), n - m + i + 1
            if end <= begin:
                continue
            whole = range(-(-(begin + told.offset) // GROUP), (end + told.offset) // GROUP)
            for group in whole if kind != "none" else ():
                if (b, g, group) not in groups:
                    tokens = slice(group * GROUP - told.offset, (group + 1) * GROUP - told.offset)
                    groups[b, g, group] = moments(kn[b, g, tokens], vn[b, g, tokens])
            kept = [groups[b, g, group] for group in whole] if kind != "none" else []
            keys, values = kn[b, g, begin:end], vn[b, g, begin:end]
            count = k_eff(coverage, minimum, end - begin)
            ends = (whole.start * GROUP - told.offset - begin, whole.stop * GROUP - told.offset - begin)
            row = _completed_row(qn[b, h, i], keys, values, count, kept, ends, kind, begin, h, told)
            chosen, output[b, h, i] = row
            indices[b, h, i, : len(chosen)] = chosen + begin
    return {"indices": torch.from_numpy(indices), "output": torch.from_numpy(output).to(q.dtype)}


def moments(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one group: sums of x k^T, ``[Dv + D, D]``, and of x, x being a value followed by its key."""
    x = np.concatenate([values, keys], 1).T
    return np.stack([tree(component * keys.T) for component in x]), tree(x)


def _completed_row(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, count: int, kept: list[tuple[np.ndarray, np.ndarray]],
    ends: tuple[int, int], kind: str, begin: int, head: int, told: Setting,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(selected of the keys that are seen, output) of one query.

    ``kept``: moments of the groups that it sees whole, whose keys are those from ``ends[0]`` up to ``ends[1]``.
    """
    score, scale = tree(q * keys), q.shape[0] ** -0.5 if told.scale is None else told.scale
    logit, factor = score, F32(scale * math.log2(math.e))
    if told.cap is not None or told.sink is not None:
        logit, factor = score * F32(scale), F32(math.log2(math.e))
        if told.cap is not None:
            y = logit / F32(told.cap)
            e = exp2(np.abs(y) * F32(-2 * math.log2(math.e)))
            logit = np.copysign((F32(1) - e) / (F32(1) + e), y) * F32(told.cap)
    chosen = np.sort(np.argsort(-score, kind="stable")[:count])
    top = logit[chosen].max()
    sink = None if told.sink is None else F32(told.sink[head])
    top = top if sink is None else max(top, sink)
    weight = exp2((logit[chosen] - top) * factor)
    below, above = tree(weight), tree(weight * values[chosen].T)
    below = below if sink is None else below + exp2((sink - top) * factor)
    inside = (chosen >= ends[0]) & (chosen < ends[1])
    many = GROUP * len(kept) - int(inside.sum())
    if not kept or many == 0:
        return chosen, above / below
    products, sums = np.zeros_like(kept[0][0]), np.zeros_like(kept[0][1])
    for one in kept:
        products, sums = products + one[0], sums + one[1]
    # Of all keys of whole groups along the query, then of those that are not selected.
    dim, wide = q.shape[0], values.shape[1]
    cross = tree(products * q)
    second, whole = tree(q * cross[-dim:]), tree(sums[wide:] * q)
    before, unit = whole / F32(GROUP * len(kept)), _unit(second)
    # Where a cap rounds, the best score need not have the best logit.
    highest = logit[chosen[np.argmax(score[chosen])]]
    highest = highest if sink is None else max(highest, sink)
    mass, excess = _tail(score, logit, chosen, highest, factor, before, unit, begin + told.offset)
    own = score[chosen[inside]] / unit
    own, squares = _sum_of_parts(_parts(own)) * unit, _sum_of_parts(_parts(own * own)) * unit * unit
    total = whole - own
    mean = total / F32(many)
    spread = (second - squares) - total * mean
    excess = excess + mass * (before - mean)
    alpha, beta = mass / F32(many), F32(0)
    if kind == "linear" and spread > second * LEAST:
        tilted = alpha - excess / spread * mean
        largest = np.abs(tilted) * np.abs(sums[:wide]).max() + np.abs(excess / spread) * np.abs(cross[:wide]).max()
        alpha, beta = (tilted, excess / spread) if np.isfinite(largest) else (alpha, beta)
    if beta == 0 and not np.isfinite(alpha * np.abs(sums[:wide]).max()):
        # What would be put back is beyond the range of float32.
        return chosen, above / below
    added = (alpha * sums[:wide] if alpha else F32(0)) + (beta * cross[:wide] if beta else F32(0))
    weight = weight - np.where(inside, alpha + beta * score[chosen], F32(0))
    above = tree(weight * values[chosen].T) + added
    return chosen, above / (below + mass)


def _tail(
    score: np.ndarray, logit: np.ndarray, chosen: np.ndarray, top: np.ndarray, factor: np.float32, mean: np.ndarray,
    unit: np.ndarray, first: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Sum of the weights of the keys that are not ``chosen``, and of weights times distances of scores from ``mean``.

    Those of all keys by runs of 16, which begin with the first token of all, ``first`` tokens before the first score;
    less those of the chosen, key by key. Sums count parts, of scores parts of a unit.
    """
    runs, mass, excess = (first + np.arange(len(score))) // RUN, [], []
    for run in np.unique(runs):
        # Sixteen places, of which those that hold nothing add zero.
        p, away, here = np.zeros(RUN, F32), np.zeros(RUN, F32), np.flatnonzero(runs == run)
        place, best = (first + here) % RUN, here[np.argmax(score[here])]
        p[place] = exp2((logit[here] - logit[best]) * factor)
        away[place] = score[here] - score[best]
        share, apart = tree(p), tree(p * away)
        relative = exp2(np.minimum((logit[best] - top) * factor, HIGHEST))
        mass.append(_parts(relative * share))
        excess.append(relative * (apart + share * (score[best] - mean)) / unit)
    for key in chosen:
        relative = exp2(np.minimum((logit[key] - top) * factor, HIGHEST))
        mass.append(-_parts(relative))
        excess.append(-(relative * (score[key] - mean)) / unit)
    # One that is too large to be counted, or no number, leaves no excess, and so no slope.
    counted = np.all(np.abs(np.stack(excess)) < MOST)
    total = _sum_of_parts(_parts(np.stack(excess))) * unit if counted else np.asarray(np.nan, F32)
    return np.maximum(_sum_of_parts(np.stack(mass)), F32(0)), total


def _unit(second: np.ndarray) -> np.ndarray:
    """The power of two at or below the root of a sum of squares, within 2^-50 and what its exponent can say."""
    power = int(np.frexp(second)[1]) - 1 if np.isfinite(second) else 128
    return np.asarray(2.0 ** (max(power if second else -100, -100) // 2), F32)


def _parts(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of parts, int64; no number counts as the least."""
    limited = np.clip(np.where(np.isnan(x), -MOST, x), -MOST, MOST)
    return np.rint(limited / PART).astype(np.int64)


def _sum_of_parts(x: np.ndarray) -> np.ndarray:
    """Integers have no order; they wrap beyond 2^63."""
    return x.sum(dtype=np.int64).astype(F32) * PART
