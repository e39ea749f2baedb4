"""One set of bits: every platform recomputes committed digests; a GPU adds the variations only it has."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.storage.moments import GROUP, add_groups, empty

from ..harness.claim import Context, Result, value
from ..harness.files import ROOT
from ..inputs import witness
from ..inputs.adversarial import ARITHMETIC, make
from ..inputs.seeded import DTYPES

GOLDEN = ROOT / "selfcheck/golden.json"
DIMS = (32, 64, 80, 96, 128, 256)
#: (heads, kv heads): GQA ratios 1, 3, 4, 7, 8
RATIOS = ((2, 2), (3, 1), (8, 2), (7, 1), (8, 1))
#: (queries, keys)
EXTENTS = ((1, 1), (1, 63), (2, 64), (1, 257), (5, 130), (1, 1000), (16, 16))
STAGES = ("scores", "indices", "output")
#: of cases whose tail is put back: (queries, keys), where some group of 128 is seen whole, and the step's dimensions
COMPLETED_EXTENTS, STEP_DIMS = ((1, 128), (1, 300), (5, 130), (1, 517), (2, 1000)), (64, 128)
STEP = "CUDA C++ step"


class Case(NamedTuple):
    """One golden case; shape = (B, H, Hkv, M, N, D)."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    budget: qaxis.Budget
    seed: int
    #: with what the tail is put back
    completion: str = "none"

    @property
    def name(self) -> str:
        b, h, kv, m, n, d = self.shape
        name = f"{str(self.dtype)[6:]} B{b} H{h}/{kv} M{m} N{n} D{d} {self.kind}"
        return name if self.completion == "none" else f"{name}, {self.completion}"

    @property
    def stages(self) -> tuple[str, ...]:
        """What of it has a digest: without a completion what it chooses from as well."""
        return STAGES if self.completion == "none" else STAGES[1:]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return make(self.kind, self.shape, self.dtype, self.seed)


def cases() -> list[Case]:
    """Every head_dim x dtype x kind, the rest cycling, then long ones."""
    out = []
    for i, (dim, dtype, kind) in enumerate(itertools.product(DIMS, DTYPES, ARITHMETIC)):
        (h, kv), (m, n) = RATIOS[i % len(RATIOS)], EXTENTS[i % len(EXTENTS)]
        budget = qaxis.Budget(0.1, 5) if i % 2 else qaxis.Budget(0, 17)
        out.append(Case(kind, (1 + i % 2, h, kv, m, n, dim), dtype, budget, i))
    for i, (n, dtype) in enumerate(itertools.product((8192, 131072), DTYPES)):
        out.append(Case("normal", (1, 2, 1, 1, n, 64), dtype, qaxis.Budget(0.05, 64), 1000 + i))
    return out


def completed_cases() -> list[Case]:
    """The stage "completed": every head_dim x kind, the rest cycling, then a long one."""
    out = []
    for i, (dim, kind) in enumerate(itertools.product(DIMS, ARITHMETIC)):
        (h, kv), (m, n) = RATIOS[i % len(RATIOS)], COMPLETED_EXTENTS[i % len(COMPLETED_EXTENTS)]
        # Kinds are as many as three times three: another dtype for each dimension.
        dtype, budget = DTYPES[(i + i // len(ARITHMETIC)) % 3], qaxis.Budget(0.1, 5) if i % 2 else qaxis.Budget(0, 17)
        completion = "mean" if i % 4 == 1 else "linear"
        out.append(Case(kind, (1 + i % 2, h, kv, m, n, dim), dtype, budget, 2000 + i, completion))
    return [*out, Case("normal", (1, 2, 1, 1, 8192, 64), DTYPES[2], qaxis.Budget(0.05, 64), 3000, "linear")]


def digest(x: torch.Tensor) -> str:
    """SHA-256 of shape and bits; indices as int64, numbers as float32 (exact for all three dtypes)."""
    x = x.float() if x.is_floating_point() else x
    return hashlib.sha256(str(tuple(x.shape)).encode() + x.cpu().contiguous().numpy().tobytes()).hexdigest()


def stages(
    qkv: tuple[torch.Tensor, ...], budget: qaxis.Budget, backend: str, completion: str = "none"
) -> dict[str, torch.Tensor]:
    """Scores (of the last query's selected keys), indices and output: enough to name the operation that differs.

    With a completion indices and output.
    """
    q, k, v = qkv
    if completion != "none":
        if backend == "numpy":
            return witness.completed(q, k, v, budget.coverage, budget.minimum, completion)
        if backend == "step":
            step = decode_step(q, k, v, budget, completion)
            return {"indices": step.indices, "output": step.output}
        result = qaxis.topk_attention(q, k, v, budget, backend=backend, completion=completion)
        return {"indices": result.indices, "output": result.output}
    if backend == "numpy":
        return witness.attention(q, k, v, budget.coverage, budget.minimum)
    result = qaxis.topk_attention(q, k, v, budget, backend=backend)
    last = result.indices[:, :, -1:].clamp(min=0)
    if backend == "triton":
        from qaxis.attention import triton as kernels

        score = kernels.scores(q[:, :, -1:], k, last)
    else:
        group = q.shape[1] // k.shape[1]
        keys = k.repeat_interleave(group, 1).float()
        chosen = keys.gather(2, last[:, :, 0, :, None].expand(-1, -1, -1, k.shape[-1]))
        score = canonical.pair_scores(q[:, :, -1, None].float(), chosen)[:, :, None]
    return {"scores": score, "indices": result.indices, "output": result.output}


def first_difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Where two tensors first differ, with both bit patterns."""
    if a.shape != b.shape:
        return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    x, y = (t.cpu().float().view(torch.int32) if t.is_floating_point() else t.cpu() for t in (a, b))
    if torch.equal(x, y):
        return "the witness agrees with it: the committed digest is another arithmetic's"
    where = tuple((x != y).nonzero()[0].tolist())
    return f"element {where}: {int(x[where]) & 0xFFFFFFFF:#010x} and {int(y[where]) & 0xFFFFFFFF:#010x}"


def decode_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: qaxis.Budget, completion: str) -> Any:
    """The decode step of CUDA C++ over bounds, for one query a head."""
    # It brings Triton, which exists for Linux only.
    from qaxis.decode import Decoder, index_keys

    (batch, heads, _, dim), n = q.shape, k.shape[2]
    step = Decoder(batch, heads, n, dim, budget.k_eff(n), q.device)
    sums = add_groups(empty(k, v), k, v, 0, n // GROUP)
    return step(q, k, v, index_keys(k), completion=completion, moments=sums)


def platforms(context: Context, case: Case) -> list[tuple[str, str, str]]:
    """(name, device, backend) of what is compared here: on a GPU only what needs one, the rest is any CPU's claim."""
    if context.device != "cpu":
        found = [("PyTorch CUDA", context.device, "reference"), ("Triton GPU", context.device, "triton")]
        stepped = case.completion != "none" and case.shape[3] == 1 and case.shape[5] in STEP_DIMS
        return [*found, (STEP, context.device, "step")] if stepped else found
    found = [("NumPy", "cpu", "numpy"), ("PyTorch CPU", "cpu", "reference")]
    return found if find_spec("triton") is None else [*found, ("Triton interpreter", "cpu", "triton")]


@dataclass
class _Row:
    """Golden cases of one dtype and extent."""

    dtype: str
    shapes: str
    equal: dict[str, int]
    cases: int = 0
    gap: float = 0.0
    differ: int = 0
    indices: int = 0
    digests: Any = field(default_factory=hashlib.sha256)
    #: comparisons
    compared: int = 0

    def fields(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shapes": self.shapes, "cases": self.cases, "gap": self.gap,
                "differ": self.differ, "equal": self.equal, "sha256": self.digests.hexdigest()}  # fmt: skip

    def add(self, context: Context, case: Case, right: dict[str, str]) -> list[str]:
        """Compute one case on every platform; what differs from the committed digests, in words."""
        self.cases += 1
        self.digests.update("".join(right.get(s, "missing") for s in case.stages).encode())
        made, kept = case.inputs(), dict[str, torch.Tensor]()
        wrong = []
        for platform, device, backend in platforms(context, case):
            got = stages(tuple(x.to(device) for x in made), case.budget, backend, case.completion)
            bad = [s for s in case.stages if digest(got[s]) != right.get(s)]
            self.compared += 1
            self.equal[platform] = self.equal.get(platform, 0) + (not bad)
            if bad:
                # A digest cannot say where; NumPy, which shares no code with the others, can.
                here = stages(made, case.budget, "numpy", case.completion)
                where = first_difference(here[bad[0]], got[bad[0]])
                wrong.append(f"{platform}: {bad[0]} differ from the committed digest, {where}")
            if kept:
                largest = float((kept["output"].double() - got["output"].double()).abs().max())
                self.gap = max(self.gap, largest)
                self.differ += int((kept["indices"] != got["indices"]).sum())
                self.indices += kept["indices"].numel()
            kept = kept or got
        return wrong


def _exp2_samples(context: Context) -> dict[str, torch.Tensor]:
    """2^t of the sampled inputs, by what computed it here."""
    sample = exp2_sample()
    here = {"PyTorch": canonical.exp2(sample.to(context.device)).cpu()}
    return here if context.device != "cpu" else {**here, "NumPy": torch.from_numpy(witness.exp2(sample.numpy()))}


def golden(context: Context) -> Result:
    """Recompute every digest on every platform of this machine; NumPy says where a difference is."""
    expected = json.loads(GOLDEN.read_text("utf-8"))
    # The stride shares no factor with the periods of the grid, so that a quick run meets every extent and kind.
    plain, completed = cases(), completed_cases()
    if context.quick:
        plain, completed = plain[::13] + plain[5::13] + plain[162:163], completed[::7]
    plan = plain + completed
    wrong: list[str] = []
    rows: dict[str, _Row] = {}
    for case in context.progress(plan, "golden digests"):
        stage = "cases" if case.completion == "none" else "completed"
        short, extent = str(case.dtype)[6:], "N >= 8192" if case.shape[4] >= 8192 else f"D = {case.shape[5]}"
        extent = extent if stage == "cases" else stage
        here = [name for name, _, _ in platforms(context, case)]
        row = rows.setdefault(f"{short} {extent}", _Row(short, extent, dict.fromkeys(here, 0)))
        said = row.add(context, case, expected[stage].get(case.name, {}))
        wrong += [f"{case.name}, {what}" for what in said]
    for platform, sample in _exp2_samples(context).items():
        if digest(sample) != expected["exp2_sample"]:
            where = first_difference(torch.from_numpy(witness.exp2(exp2_sample().numpy())), sample)
            wrong.append(f"{platform}: exp2 of the sampled inputs, {where}")
    names = dict.fromkeys(name for row in rows.values() for name in row.equal)
    count = {name: sum(row.equal.get(name, 0) for row in rows.values()) for name in names}
    compared, indices = sum(row.compared for row in rows.values()), sum(row.indices for row in rows.values())
    differ = sum(row.differ for row in rows.values())
    values = {
        "equal": value(sum(count.values()), "digests x platforms", n=compared),
        "differing": value(len(wrong), "digests x platforms", n=compared),
        "cases": value(len(plan), "cases", n=len(plan)), "completed": value(len(completed), "cases"),
        "platforms": value(len(count), "platforms"),
        "max_difference": value(max(row.gap for row in rows.values()), "", n=compared),
        "agreement": value(1 - differ / max(indices, 1), "", n=indices),
    }  # fmt: skip
    return Result(
        passed=not wrong,
        verdict=wrong[0] if wrong else "all digests equal",
        headline=", ".join(f"{name}: {n}" for name, n in count.items()) + f" of {len(plan)} cases equal",
        values=values,
        cases=compared,
        data={"count": count, "rows": [row.fields() for row in rows.values()]},
        checks=[case.name for case in plan],
    )


def exp2_sample(stride: int = 4093) -> torch.Tensor:
    """Every ``stride``-th float32 in [-150, 128], by bit pattern."""
    positive = torch.arange(0, 0x43000000, stride, dtype=torch.int64)
    negative = torch.arange(0x80000000, 0xC3160000, stride, dtype=torch.int64) - (1 << 32)
    return torch.cat([positive, negative]).to(torch.int32).view(torch.float32)


def make_golden() -> dict[str, Any]:
    """The digests as the CPU reference computes them; committed once, confirmed everywhere else."""
    tables: dict[str, dict[str, dict[str, str]]] = {"cases": {}, "completed": {}}
    for case in (*cases(), *completed_cases()):
        got = stages(case.inputs(), case.budget, "reference", case.completion)
        stage = "cases" if case.completion == "none" else "completed"
        tables[stage][case.name] = {s: digest(got[s]) for s in case.stages}
    return {"arithmetic": canonical.VERSION, **tables, "exp2_sample": digest(canonical.exp2(exp2_sample()))}
