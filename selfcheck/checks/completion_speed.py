"""How long a decode step takes that puts back what it leaves out, beside the same step without."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

import qaxis
from qaxis.attention import completed
from qaxis.attention.completion import KINDS, Seen
from qaxis.attention.logits import Logits
from qaxis.cuda.compiler import runs_on
from qaxis.decode import Decoder, KeyIndex, index_keys, places
from qaxis.decode.cuda import CAPABILITY, CudaStep
from qaxis.storage.moments import GROUP, add_groups, empty

from ..harness.claim import Context, NotRunError, Result, value
from ..harness.timing import CLEAN, WRITTEN, capture, fastest, microseconds, ratio
from ..inputs.heads import INDEPENDENT, drawn

if torch.cuda.is_available():
    from ..rivals import dense_decoding

Shape = tuple[int, int, int]
#: batch, N, k_eff; bfloat16. Those of certified-speed, one of few keys, one that ends within a group
SHAPES: tuple[Shape, ...] = (
    (1, 131072, 2048), (4, 32768, 2048), (1, 32768, 2048), (1, 1048576, 2048), (1, 131072, 13108), (1, 8192, 820),
    (1, 131035, 2048),
)  # fmt: skip
#: what the step reads of every key: its 8-bit codes, or the key itself
WAYS = {"codes": True, "keys": False}
#: query heads, KV heads, and the dimensions of each
SIZES = (32, 8, 128)


@torch.inference_mode()
def step(context: Context) -> Result:
    """Steps without completion, with a mean and with a line, replayed together, with the bits of their meaning."""
    if context.device == "cpu":
        raise NotRunError("a speed under CUDA graphs needs a GPU")
    if not runs_on(torch.device(context.device), CAPABILITY):
        raise NotRunError(f"a completed step needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")
    repeats = 11 if context.quick else 101
    generator = torch.Generator("cuda").manual_seed(context.seed)
    found: list[Found] = []
    for shape in context.progress(SHAPES[2:3] if context.quick else SHAPES, "shapes"):
        found.append(_measured(Case(shape, generator), repeats))
        torch.cuda.empty_cache()
    return result(found, repeats)


@dataclass
class Found:
    """What was measured of one shape."""

    shape: Shape
    #: by what was in the cache before and by "way/completion" or "dense/name", microseconds of every round
    times: dict[str, dict[str, list[float]]]
    #: steps by "way/completion" whose last replay left other indices or bits
    wrong: list[str]

    def row(self, way: str, kind: str) -> dict[str, Any]:
        """One step, beside that of the same way without completion, round by round."""
        return {
            **dict(zip(("batch", "n", "k_eff"), self.shape, strict=True)), "way": way, "completion": kind,
            **self._compared(way, kind, WRITTEN), CLEAN: self._compared(way, kind, CLEAN),
        }  # fmt: skip

    def _compared(self, way: str, kind: str, flush: str) -> dict[str, Any]:
        times = self.times[flush]
        own = times[f"{way}/{kind}"]
        dense = {name.partition("/")[2]: t for name, t in times.items() if name.startswith("dense/")}
        best = fastest(dense)
        return {
            "took": statistics.median(own), **ratio(own, times[f"{way}/none"])._asdict(),
            "best": best, "dense": statistics.median(dense[best]),
        }  # fmt: skip


def result(found: Sequence[Found], repeats: int) -> Result:
    """Every shape, way and completion."""
    rows = [x.row(way, kind) for x in found for way in WAYS for kind in KINDS]
    wrong = [f"B={x.shape[0]} N={x.shape[1]} k={x.shape[2]} {name}" for x in found for name in x.wrong]
    values = {"repeats": value(repeats, "replays"), "wrong": value(len(wrong), "steps", n=len(rows))}
    for r in rows:
        name = f"{r['way']}_{r['completion']}_b{r['batch']}_n{r['n']}_k{r['k_eff']}"
        for suffix, x in (("", r), ("_clean", r[CLEAN])):
            values[f"{name}{suffix}_us"] = value(x["took"], "us", n=repeats)
            if r["completion"] != "none":
                ends = {"low": x["low"], "high": x["high"]}
                values[f"{name}{suffix}"] = value(x["value"], "x none", n=repeats, **ends)
    return Result(
        passed=not wrong,
        verdict=f"{wrong[0]}: another set or output" if wrong else "measured, with the bits of the reference",
        headline="; ".join(
            f"B={r['batch']} N={r['n']} k={r['k_eff']} {r['way']} {r['value']:.3f}x, {r[CLEAN]['value']:.3f}x clean"
            for r in rows
            if r["completion"] == "linear"
        ),
        values=values,
        cases=len(rows),
        data={"rows": rows, "wrong": wrong},
    )


def _measured(case: Case, repeats: int) -> Found:
    """Steps and dense ones of one shape, captured, and replayed together in random order."""
    batch, n, k_eff = case.shape
    dense = dense_decoding.variants(case.q, case.k, case.v)
    graphs = {f"dense/{name}": graph for name, graph in dense_decoding.captured(dense, capture).items()}
    # What each call of a step gave, of which the last was captured.
    kept: dict[str, list[Any]] = {}
    for one in case.steps():
        kept[one.name] = []
        graphs[one.name] = capture(partial(_keep, kept[one.name], one))
    times = microseconds(graphs, repeats, f"B={batch}, N={n}, k={k_eff}", clean=graphs.keys())
    # What the last replay wrote, where the captured call left it.
    return Found(case.shape, times, [one.name for one in case.steps() if case.differs(one, kept[one.name][-1])])


def _keep(kept: list[Any], one: Step) -> None:
    kept.append(one())


class Case:
    """Queries, keys and values of one shape, what is right, and the steps over them."""

    def __init__(self, shape: Shape, generator: torch.Generator, sizes: Shape = SIZES) -> None:
        self.shape = shape
        batch, n, k_eff = shape
        heads, kv_heads, dim = sizes
        self.q, self.k, self.v = drawn(INDEPENDENT, (batch, heads, kv_heads, n, dim), generator)
        self.moments = add_groups(empty(self.k, self.v), self.k, self.v, 0, n // GROUP)
        self.exact = qaxis.topk_attention(self.q, self.k, self.v, k_eff, backend="reference")
        self.made: list[Step] = []

    def steps(self) -> list[Step]:
        """Each completion over each way to read the keys, each with a work space of its own."""
        batch, n, k_eff = self.shape
        for way, codes in WAYS.items() if not self.made else ():
            index = index_keys(self.k, codes=codes)
            for kind in KINDS:
                decoder = Decoder(batch, self.q.shape[1], n, self.q.shape[3], k_eff, self.q.device)
                self.made.append(Step(f"{way}/{kind}", decoder, self, index, kind))
        return self.made

    def differs(self, one: Step, got: Any) -> bool:
        """Whether ``got`` has other indices, or another bit of the output, than the step ``one`` has to give."""
        return not (torch.equal(got.indices, self.exact.indices) and torch.equal(got.output, self._right(one)))

    def _right(self, one: Step) -> torch.Tensor:
        """The output by the reference, over codes from the places that the step left in its buffers."""
        if one.kind == "none":
            return self.exact.output
        q, k, v, indices = self.q, self.k, self.v, self.exact.indices
        batch, n = k.shape[0], k.shape[2]
        logits, kept = Logits(q.shape[3] ** -0.5), completed.Kept(self.moments, [(0, n // GROUP)] * batch)
        if one.index.codes is None:
            seen = Seen(*torch.tensor([0, n], device=q.device))
            return completed.attend(q, k, v, indices, logits, one.kind, seen, kept)
        work = cast(CudaStep, one.decoder.cuda_step(q, k, v, one.index, completion=one.kind)).buffers
        return places.attend(
            q, k, v, indices, one.decoder.all_rows, work.fast, work.units, logits, one.kind,
            one.index.codes.first.shape[2], kept=kept,
        )  # fmt: skip


@dataclass
class Step:
    """One completion over one way to read the keys of a case; a call takes the step."""

    name: str
    decoder: Decoder
    case: Case
    index: KeyIndex
    kind: str

    def __call__(self) -> Any:
        case, moments = self.case, None if self.kind == "none" else self.case.moments
        return self.decoder(case.q, case.k, case.v, self.index, completion=self.kind, moments=moments)
