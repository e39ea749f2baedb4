"""How many keys a certified selection has to score canonically, by rule, bound and codes, on real queries and keys.

    python -m benchmarks.candidates --keep /tmp/keys --write

The last queries of an article stand for decode steps, each with the keys it sees. Scores of all keys come from codes,
as ``score_codes.cu`` makes them (the query in two 8-bit parts, the score in 16 bits), each with a proven bound on its
distance from the canonical score (``arithmetic/fast_scores.py``). A rule says which keys are scored canonically; most
rules need luck, and a certificate says whether they had it: a threshold is good if ``k`` canonical scores reach it, as
every key that could reach it was scored. Two things are asserted: the bound of every key of every row, and that the
``k`` best keys (ties included) are among those that a rule scored, whenever it is certain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import click
import torch
from tqdm import tqdm

import qaxis
from qaxis.arithmetic import fast_scores
from qaxis.arithmetic.reference import power_of_two
from qaxis.storage.formats import EIGHT
from qaxis.storage.grid import Grid, quantize
from qaxis.validation import require

HERE = Path(__file__).resolve().parent
GROUP = EIGHT.group_size
#: queries of a text that are looked at, of which every EVERY-th from the AFTER-th is a step; others are
#: what a step remembers
QUERIES, AFTER, EVERY = 256, 7, 4
#: keys that are kept, of those that are seen
SHARES = (1 / 64, 0.05, 0.1)
MARGINS = (0.02, 0.05, 0.13, 0.3)
#: the margin where only one is asked for
MARGIN = 0.05
SAMPLES, RUNS, DEVIATIONS, PAST = (2, 4, 8, 32), (GROUP, 16), (0.0, 2.0, 3.5), (0.15, 0.3)
#: fewer keys have no sample
LEAST = max(SAMPLES) * GROUP
#: layers of SmolLM2-135M, and those of Gemma 3 270M that see every token
LAYERS = {"smollm2": (0, 7, 14, 22, 29), "gemma": (5, 11, 17)}
#: of random queries: the cosine between the heads of a group
COSINES = {"random": 0.0, "correlated": 0.7}
ARTICLES = {"smollm2": 3, "gemma": 2}


class Inputs(NamedTuple):
    """Of one layer: q ``[H, M, D]`` and k ``[Hkv, N, D]``, bfloat16; the queries are of the last positions."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor


# Where queries and keys come from.


def real(name: str, articles: int, tokens: int, keep: Path | None) -> Iterator[Inputs]:
    """Inputs of some layers of a model, article by article; ``keep`` is a folder to leave them in for the next time."""
    path = keep / f"{name}-{articles}-{tokens}.pt" if keep else None
    if path and path.is_file():
        found = torch.load(path)
    else:
        found = captured(name, articles, tokens)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path)
    return (Inputs(*x) for x in found)


def captured(name: str, articles: int, tokens: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(layer, q, k) of the articles, one dense pass each."""
    from selfcheck.inputs import optional, subjects
    from selfcheck.inputs.capture import capture

    if name == "gemma":
        with optional.joined(optional.subjects()["gemma"]) as path:
            loaded = subjects.load(str(path), None, "cpu", articles, tokens)
    else:
        loaded = subjects.load(None, None, "cpu", articles, tokens)
    return [
        (seen.layer, seen.q[0].bfloat16(), seen.k[0].bfloat16())
        for ids in tqdm(loaded.texts, desc=f"{name}: forward passes")
        for seen in capture(loaded.model, ids, LAYERS[name], QUERIES)
    ]


def drawn(cosine: float, tokens: int, kv_heads: int = 4, group: int = 4, dim: int = 128) -> Iterator[Inputs]:
    """Normal keys, and normal queries whose heads within a group have this cosine with each other."""
    random = torch.Generator().manual_seed(0)
    m = 16 * EVERY + AFTER - EVERY + 1
    common = torch.randn(kv_heads, 1, m, dim, generator=random)
    own = torch.randn(kv_heads, group, m, dim, generator=random)
    q = math.sqrt(cosine) * common + math.sqrt(1 - cosine) * own
    yield Inputs(0, q.flatten(0, 1).bfloat16(), torch.randn(kv_heads, tokens, dim, generator=random).bfloat16())


# Codes, and fast scores by them.


@dataclass(frozen=True)
class Codes:
    """Keys ``[N, D]`` of a head, about ``integers * steps + centres``, the latter ``[groups, D]`` of 128 tokens.

    ``residuals [N]`` bounds the length of what is left out of each key, ``weighted [N]`` and ``own [N]`` the same with
    channels divided by ``weights [D]`` and by ``own_weights [groups, D]``; all float64.
    """

    integers: torch.Tensor
    steps: torch.Tensor
    centres: torch.Tensor
    residuals: torch.Tensor
    weighted: torch.Tensor
    own: torch.Tensor

    @property
    def own_weights(self) -> torch.Tensor:
        """Any weights give a proven bound. Where steps are large codes leave out more: their roots give a small one."""
        return self.steps.sqrt()

    @property
    def weights(self) -> torch.Tensor:
        """One for each channel of a head."""
        return self.own_weights.amax(0)


def _codes(k: torch.Tensor, integers: torch.Tensor, steps: torch.Tensor, centres: torch.Tensor) -> Codes:
    left_out = k - (integers * steps[:, None] + centres[:, None])
    codes = Codes(integers.flatten(0, 1), steps, centres, *[torch.empty(0)] * 3)
    # In float64 all but exact; what is not is far below how much a bound is rounded up.
    by = (left_out, left_out / codes.weights, left_out / codes.own_weights[:, None])
    bounds = (torch.linalg.vector_norm(x, dim=-1).flatten() * fast_scores.UPWARD for x in by)
    return Codes(codes.integers, steps, centres, *bounds)


def powers_of_two(k: torch.Tensor, bits: int) -> Codes:
    """Symmetric codes whose steps are powers of two, as the cache's of 8 bits. k ``[groups, 128, D]``, float64."""
    if bits == 8:
        integers, exponents, _ = quantize(k.float(), 1, Grid(8))
        steps = power_of_two(exponents.int()).double()
    else:
        # As with 8 bits: the smallest power of two that reaches the largest number.
        limit = 2 ** (bits - 1) - 1
        steps = torch.exp2(torch.ceil(torch.log2((k.abs().amax(1, keepdim=True) / limit).clamp(min=2.0**-126))))
        integers = torch.round(k / steps).clamp(-limit, limit)
    return _codes(k, integers.double(), steps[:, 0], torch.zeros_like(steps[:, 0]))


def symmetric(k: torch.Tensor, bits: int) -> Codes:
    """Symmetric codes with float32 steps."""
    limit = 2 ** (bits - 1) - 1
    steps = (k.abs().amax(1, keepdim=True) / limit).clamp(min=2.0**-126).float().double()
    return _codes(k, torch.round(k / steps).clamp(-limit, limit), steps[:, 0], torch.zeros_like(steps[:, 0]))


def asymmetric(k: torch.Tensor, bits: int) -> Codes:
    """Codes from the lowest to the highest number, float32 steps and zero points."""
    low, high = k.amin(1, keepdim=True), k.amax(1, keepdim=True)
    half = 2 ** (bits - 1)
    steps = ((high - low) / (2 * half - 1)).clamp(min=2.0**-126).float().double()
    centres = (low + half * steps).float().double()
    return _codes(k, torch.round((k - centres) / steps).clamp(-half, half - 1), steps[:, 0], centres[:, 0])


CODES = {
    "8 bits": (powers_of_two, 8),
    "8 bits, real steps": (symmetric, 8),
    "6 bits, powers of two": (powers_of_two, 6),
    "6 bits, zero point": (asymmetric, 6),
    "5 bits, zero point": (asymmetric, 5),
    "4 bits, zero point": (asymmetric, 4),
}


def grouped(residuals: torch.Tensor) -> torch.Tensor:
    """For every key the largest of its group."""
    return residuals.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP)


def bounds(q: torch.Tensor, codes: Codes) -> dict[str, torch.Tensor]:
    """By name: what q ``[R, D]`` makes of what is left out of every key at most, float64 ``[R, N]`` (Cauchy-Schwarz).

    ``|<q, r>| <= |q| |r|``, with one bound on ``|r|`` a head, a group or a key; or ``|q w| |r / w|``, of which a head,
    or a group, has its own weights.
    """

    def length(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(x, dim=-1) * 1.001

    plain, weighted = length(q)[:, None], length(q * codes.weights)[:, None]
    own = length(q[:, None] * codes.own_weights).repeat_interleave(GROUP, 1)
    # One byte: exponents of an eighth, rounded up.
    byte = torch.exp2(torch.ceil(torch.log2(codes.residuals.clamp(min=2.0**-126)) * 8) / 8)
    return {
        "head": plain * codes.residuals.amax().expand_as(byte),
        "group": plain * grouped(codes.residuals),
        "byte": plain * byte,
        "key": plain * codes.residuals,
        "weighted head": weighted * codes.weighted.amax().expand_as(byte),
        "weighted group": weighted * grouped(codes.weighted),
        "weighted key": weighted * codes.weighted,
        "own weights, group": own * grouped(codes.own),
    }


@dataclass(frozen=True)
class Fast:
    """16-bit scores ``[R, N]``, -inf where a key is not seen, and in the same unit one score's error by each bound."""

    scores: torch.Tensor
    errors: dict[str, torch.Tensor]
    #: by bound, at least what the canonical score can be
    upper: dict[str, torch.Tensor]
    #: units in one of score, ``[R, 1]``
    units: torch.Tensor
    #: the scores, highest first
    ranked: torch.Tensor


def fast(q: torch.Tensor, k: torch.Tensor, codes: Codes, seen: torch.Tensor) -> Fast:
    """Scores of q ``[R, D]`` as score_codes.cu makes them, and their bounds as choose.cu uses them."""
    dim = q.shape[1]
    most = (q.abs() * codes.steps.amax(0)).amax(1, keepdim=True).clamp(min=1e-30)
    scaled = q * codes.steps[:, None] * (127 / most)
    high = torch.floor(scaled + 0.5)
    low = torch.floor((scaled - high) * 254 + 0.5).clamp(-128, 127)
    parts = (high + low / 254) * (most / 127)
    product = parts @ codes.integers.unflatten(0, (-1, GROUP)).transpose(1, 2) + (codes.centres @ q.T)[:, :, None]
    product = product.transpose(0, 1).flatten(1, 2)
    longest = torch.linalg.vector_norm(k, dim=-1).amax() * fast_scores.UPWARD
    norm_k = (longest + codes.residuals.amax()) * fast_scores.UPWARD
    norm_q = torch.linalg.vector_norm(q, dim=1, keepdim=True) * 1.001
    units = fast_scores.UNITS / (norm_q * norm_k * 1.001)
    scores = torch.floor(product * units).clamp(-32768, 32767).masked_fill(~seen, -torch.inf)
    split = most * (fast_scores.SPLIT / 128 * codes.integers.abs().amax() * dim)
    errors = {
        name: (bound + norm_q * fast_scores.rounding(dim) * norm_k + split) * units * 1.01 + 1
        for name, bound in bounds(q, codes).items()
    }
    upper = {name: scores + error for name, error in errors.items()}
    return Fast(scores, errors, upper, units, ordered(scores))


# Rules: which keys are scored canonically, and whether that was enough.


class Rows(NamedTuple):
    """The steps of a KV head: R rows are its query heads, one after the other, each with the same steps."""

    heads: int
    #: keys that each row sees, int64 [R, 1], and which
    n: torch.Tensor
    seen: torch.Tensor
    #: canonical scores, float64 [R, N], -inf where a key is not seen
    canonical: torch.Tensor
    #: of the scores of all that is seen, float64 [R, 1]
    mean: torch.Tensor
    deviation: torch.Tensor
    #: by share: the keys at least as good as the last that is kept, bool [R, N], and its canonical score [R, 1]
    best: dict[float, torch.Tensor]
    last: dict[float, torch.Tensor]
    #: by share: how many deviations above the mean the last kept key was, of the last step and the lowest of four
    past: dict[float, dict[str, torch.Tensor]]


@dataclass
class Found:
    """What a rule scored, as a share of what is seen, a row a number; and in how many it was not enough."""

    shares: list[torch.Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    failed: int = 0

    def summary(self) -> dict[str, object]:
        """Mean, 95th percentile, largest, share of rows that failed, and the mean of each layer."""
        every = torch.cat(self.shares)
        by: dict[int, list[torch.Tensor]] = {}
        for layer, share in zip(self.layers, self.shares, strict=True):
            by.setdefault(layer, []).append(share)
        return {
            "mean": round(float(every.mean()), 5),
            "p95": round(float(every.quantile(0.95)), 5),
            "largest": round(float(every.amax()), 5),
            "failed": round(self.failed / len(every), 5),
            "layers": {layer: round(float(torch.cat(x).mean()), 5) for layer, x in sorted(by.items())},
        }


@dataclass
class Results:
    """Of one source: by share of keys kept and rule what was scored, and what was checked on the way."""

    found: dict[float, dict[str, Found]] = field(default_factory=dict)
    #: by share: of a group's heads, keys scored (or kept) by any, over the sum of those by each
    unions: dict[float, dict[str, list[float]]] = field(default_factory=dict)
    rows: int = 0
    certain: int = 0
    bounded: int = 0

    def add(self, layer: int, share: float, rule: str, rows: Rows, scored: torch.Tensor, sure: torch.Tensor) -> None:
        """Take in what ``rule`` scored, bool ``[R, N]``, and in which rows it is certain, bool ``[R]``."""
        lost = (rows.best[share] & ~scored).any(1) & sure
        assert not lost.any(), f"{rule}: {int(lost.sum())} rows lost a key that is among the best"
        self.certain += int(sure.sum())
        found = self.found.setdefault(share, {}).setdefault(rule, Found())
        found.shares.append((scored.sum(1) / rows.n[:, 0]).float())
        found.layers.append(layer)
        found.failed += int((~sure).sum())

    def union(self, share: float, name: str, rows: Rows, some: torch.Tensor) -> None:
        """Keys ``some`` bool ``[R, N]`` of any head of the group, over the sum of its heads."""
        by_head = some.unflatten(0, (rows.heads, -1))
        ratio = by_head.any(0).sum(1) / by_head.sum((0, 2)).clamp(min=1)
        self.unions.setdefault(share, {}).setdefault(name, []).extend(ratio.tolist())


def kept(n: torch.Tensor, share: float) -> torch.Tensor:
    """Keys that are kept of ``n``."""
    return torch.ceil(n * share).long()


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Each row, the highest first."""
    return x.sort(dim=-1, descending=True).values


def ahead(f: Fast, k: torch.Tensor, margin: float) -> torch.Tensor:
    """The fast score that ``k (1 + margin)`` keys reach."""
    return f.ranked.gather(1, torch.ceil(k * (1 + margin)).long() - 1)


@dataclass(frozen=True)
class Sample:
    """Some runs of keys: their fast scores, highest first, and how many of them each row sees, ``[R, 1]``."""

    ranked: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, f: Fast, rows: Rows, every: int, run: int) -> Sample:
        """One of ``every`` runs of ``run`` keys, neither the first nor the last where there are more than two."""
        chosen = torch.arange(f.scores.shape[1]) // run % every == every // 2
        return cls(ordered(f.scores[:, chosen]), (rows.seen & chosen).sum(1, keepdim=True))

    def threshold(self, n: torch.Tensor, k: torch.Tensor, deviations: float) -> torch.Tensor:
        """The fast score that about ``k (1 + MARGIN)`` of n keys reach, or so many deviations of chance more."""
        part = self.size / n
        rank = torch.ceil(k * part * (1 + MARGIN)) + deviations * torch.sqrt(k * part * (1 + MARGIN) * (1 - part))
        return self.ranked.gather(1, rank.ceil().long().minimum(self.size) - 1)


@dataclass(frozen=True)
class Rules:
    """Every rule on the rows of one KV head, whose fast scores by all codes are ``found``."""

    results: Results
    layer: int
    rows: Rows
    found: dict[str, Fast]

    def apply(self) -> None:
        """Take what every rule scores, and whether it is certain, into the results."""
        rows, eight = self.rows, self.found["8 bits"]
        certain = {bound: ordered(eight.scores - eight.errors[bound]) for bound in ("group", "key")}
        samples = {(every, run): Sample.of(eight, rows, every, run) for every in SAMPLES for run in RUNS}
        for share in SHARES:
            k = kept(rows.n, share)
            for name, bound in (
                ("today: one bound a head", "head"),
                ("today's rule, one weighted bound", "weighted head"),
            ):
                cut = eight.ranked.gather(1, k - 1) - (2 * eight.errors[bound] + 1)
                self.surely(share, name, eight.scores >= cut)
            for bound, lowest in certain.items():
                scored = eight.upper[bound] >= lowest.gather(1, k - 1)
                self.surely(share, f"proven cut, one bound a {bound}", scored)
            for bound in eight.errors:
                for margin in MARGINS if bound == "group" else (MARGIN,):
                    name = f"counted, {bound}, margin {100 * margin:.0f} %"
                    scored = self.perhaps(share, name, ahead(eight, k, margin), eight, bound)
                    if margin == MARGIN and bound == "group":
                        self.results.union(share, "scored", rows, scored)
            self.results.union(share, "kept", rows, rows.best[share])
            for (every, run), sample in samples.items():
                for z in DEVIATIONS:
                    name = f"sampled, 1 in {every} runs of {run}, z = {z:g}"
                    self.perhaps(share, name, sample.threshold(rows.n, k, z), eight, "group")
            for which, past in rows.past[share].items():
                for less in PAST:
                    threshold = (rows.mean + (past - less) * rows.deviation) * eight.units
                    self.perhaps(share, f"from {which}, less {less:g}", threshold, eight, "group")
            for name in list(CODES)[1:]:
                for bound in ("group", "byte", "key", *WEIGHTED):
                    f = self.found[name]
                    self.perhaps(share, f"{name}, {bound}", ahead(f, k, MARGIN), f, bound)

    def surely(self, share: float, name: str, scored: torch.Tensor) -> None:
        """A rule that is always certain."""
        self.results.add(self.layer, share, name, self.rows, scored, torch.ones(len(scored), dtype=torch.bool))

    def perhaps(self, share: float, name: str, threshold: torch.Tensor, f: Fast, bound: str) -> torch.Tensor:
        """A rule that scores what could reach a threshold ``[R, 1]``, and is certain if enough canonical scores do."""
        scored = f.upper[bound] >= threshold
        # As many as are kept reach it if the last of them does.
        sure = (self.rows.last[share] * f.units >= threshold)[:, 0]
        self.results.add(self.layer, share, name, self.rows, scored, sure)
        return scored


def steps(q: torch.Tensor, k: torch.Tensor, canonical: torch.Tensor) -> Rows:
    """The rows of one KV head: q ``[group, M, D]``, k ``[N, D]``, canonical scores ``[group, M', N]`` of the steps."""
    heads, m, n = len(q), q.shape[1], len(k)
    sees = torch.arange(n - m, n) + 1
    seen = torch.arange(n) < sees[:, None]
    # Mean and deviation of the scores are those of the query over the keys' mean and covariance.
    scores = (q.float() @ k.float().T).masked_fill(~seen, -torch.inf)
    zeroed = scores.masked_fill(~seen, 0.0).double()
    mean = zeroed.sum(2) / sees
    deviation = (zeroed.square().sum(2) / sees - mean.square()).clamp(min=0).sqrt()
    ranked = ordered(scores)
    at = torch.arange(AFTER, m, EVERY)
    past = {}
    for share in SHARES:
        kth = ranked.gather(2, (kept(sees, share) - 1).expand(heads, m)[..., None])[..., 0]
        z = (kth - mean) / deviation.clamp(min=1e-30)
        lowest = torch.stack([z[:, at - i] for i in range(1, 5)]).amin(0)
        past[share] = {"the last step": z[:, at - 1].reshape(-1, 1), "the lowest of 4 steps": lowest.reshape(-1, 1)}
    visible = seen[at].repeat(heads, 1)
    of = sees[at].repeat(heads)[:, None]
    canonical = canonical.double().flatten(0, 1).masked_fill(~visible, -torch.inf)
    by_score = ordered(canonical)
    last = {share: by_score.gather(1, kept(of, share) - 1) for share in SHARES}
    return Rows(
        heads, of, visible, canonical, mean[:, at].reshape(-1, 1), deviation[:, at].reshape(-1, 1),
        {share: canonical >= lowest for share, lowest in last.items()}, last, past,
    )  # fmt: skip


def measure(source: Iterator[Inputs], name: str) -> Results:
    """Every rule on every head of ``source``."""
    results = Results()
    for layer, q, k in tqdm(source, desc=name):
        heads = len(q) // len(k)
        for g, keys in enumerate(k):
            queries = q[g * heads : (g + 1) * heads]
            at = queries[:, AFTER::EVERY]
            rows = steps(queries, keys, qaxis.canonical_scores(at[None], keys[None, None])[0])
            some, wide = at.flatten(0, 1).double(), keys.double()
            found = {}
            for kind, (make, bits) in CODES.items():
                f = found[kind] = fast(some, wide, make(wide.unflatten(0, (-1, GROUP)), bits), rows.seen)
                far = (rows.canonical * f.units - f.scores).abs()[rows.seen]
                assert bool((far <= reduce(torch.minimum, f.errors.values())[rows.seen]).all()), (
                    f"{kind}: a bound is none"
                )
                results.bounded += far.numel()
            results.rows += len(rows.n)
            Rules(results, layer, rows, found).apply()
    return results


# What is said of it.


#: bounds with weights
WEIGHTED = ("weighted head", "weighted group", "weighted key", "own weights, group")
#: rules of the table; the others are in candidates.json
SHOWN = (
    "today: one bound a head",
    "today's rule, one weighted bound",
    *(f"proven cut, one bound a {bound}" for bound in ("group", "key")),
    *(f"counted, group, margin {margin} %" for margin in (2, 5, 13, 30)),
    *(f"counted, {bound}, margin 5 %" for bound in ("head", "byte", "key", *WEIGHTED)),
    *(f"sampled, 1 in {every} runs of 128, z = {z}" for every in (2, 8) for z in (0, 3.5)),
    *(f"sampled, 1 in {every} runs of 16, z = {z}" for every in (2, 4, 8) for z in (2, 3.5)),
    "sampled, 1 in 32 runs of 16, z = 3.5",
    *(f"from {which}, less {less}" for which in ("the last step", "the lowest of 4 steps") for less in (0.15, 0.3)),
    *(f"{name}, {bound}" for name in list(CODES)[1:] for bound in ("group", "byte", "weighted head", WEIGHTED[-1])),
    *(f"keys {name} by a group over the sum of its heads" for name in ("scored", "kept")),
)  # fmt: skip


def table(written: dict[str, dict[str, object]]) -> str:
    """Rules by sources and shares, a cell being mean / 95th percentile in percent, and (rows that failed)."""
    columns = []
    for name in (name for name in (*LAYERS, *COSINES) if name in written):
        # Of random ones a share is like another.
        shares = list(written[name]["keys"])  # type: ignore[call-overload]
        columns += [(name, share) for share in (shares if name in LAYERS else shares[:1])]
    lines = ["| rule | " + " | ".join(f"{name}, {float(share):.3g} %" for name, share in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for rule in SHOWN:
        cells = [cell(written[name]["keys"][share][rule]) for name, share in columns]  # type: ignore[index]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(x: dict[str, float]) -> str:
    """One cell of the table."""
    if "p95" not in x:
        return f"{x['mean']:.2f}"
    failed = f" ({100 * x['failed']:.3g})" if x["failed"] else ""
    return f"{100 * x['mean']:.1f} / {100 * x['p95']:.1f}{failed}"


def plain(results: Results) -> dict[str, object]:
    """Results as JSON has them."""
    keys: dict[str, dict[str, dict[str, object]]] = {}
    for share, found in results.found.items():
        of = keys[f"{100 * share:.4g}"] = {rule: x.summary() for rule, x in found.items()}
        for name, ratios in results.unions[share].items():
            of[f"keys {name} by a group over the sum of its heads"] = {"mean": round(sum(ratios) / len(ratios), 4)}
    return {"rows": results.rows, "certain": results.certain, "bounds": results.bounded, "keys": keys}


def dumped(x: object, depth: int) -> str:
    """JSON of which what is deeper than ``depth`` is one line: a rule."""
    if depth == 0 or not isinstance(x, dict):
        return json.dumps(x)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {dumped(value, depth - 1)}" for key, value in x.items()) + "\n}"


@click.command()
@click.option(
    "--sources",
    default=",".join((*LAYERS, *COSINES)),
    show_default=True,
    help="With none the table is what is written.",
)
@click.option("--articles", default=None, type=int, help="Articles of a model; 3 and 2 if not given.")
@click.option("--tokens", default=8192, show_default=True, help="Of an article.")
@click.option("--keys", default=32768, show_default=True, help="Random ones.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to keep queries and keys of a model in.")
@click.option(
    "--write/--no-write", default=False, help="Write candidates.json beside this script; other sources in it stay."
)
def main(sources: str, articles: int | None, tokens: int, keys: int, keep: Path | None, write: bool) -> None:
    """Print a table: keys scored canonically, in percent of those seen."""
    for option, value in (("--tokens", tokens), ("--keys", keys)):
        require(value % GROUP == 0 and value >= LEAST, option, value, f"a multiple of {GROUP}, at least {LEAST}")
    names = list(filter(None, sources.split(",")))
    for name in names:
        require(name in LAYERS or name in COSINES, "--sources", name, f"some of {(*LAYERS, *COSINES)}")
    path = HERE / "candidates.json"
    written = json.loads(path.read_text("utf-8")) if write and path.is_file() else {}
    for name in names:
        if name in LAYERS:
            source = real(name, articles or ARTICLES[name], tokens, keep)
        else:
            source = drawn(COSINES[name], keys)
        with torch.inference_mode():
            results = measure(source, name)
        written[name] = plain(results)
        print(
            f"{name}: {results.rows} rows; {results.certain} times a rule was certain and no key among the best was "
            f"missing; {results.bounded} bounds held"
        )
        if write:
            path.write_text(dumped(written, 4) + "\n", encoding="utf-8")
    print(table(written))


if __name__ == "__main__":
    main()
