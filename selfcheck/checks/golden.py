"""One set of bits: every platform recomputes committed digests; a GPU adds the variations only it has."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention import reference
from qaxis.attention.logits import Logits

from ..harness import children
from ..harness.claim import Context, NotRunError, Result, value
from ..harness.files import ROOT
from ..inputs import witness
from ..inputs.seeded import DTYPES, KINDS, make

GOLDEN = ROOT / "selfcheck/golden.json"
DIMS = (32, 64, 80, 96, 128, 256)
#: (heads, kv heads): GQA ratios 1, 3, 4, 7, 8
RATIOS = ((2, 2), (3, 1), (8, 2), (7, 1), (8, 1))
#: (queries, keys)
EXTENTS = ((1, 1), (1, 63), (2, 64), (1, 257), (5, 130), (1, 1000), (16, 16))
STAGES = ("scores", "indices", "output")


def cases() -> list[tuple[str, str, tuple[int, ...], torch.dtype, qaxis.Budget, int]]:
    """(name, kind, shape, dtype, budget, seed): every head_dim x dtype x kind, the rest cycling, then long ones."""
    out: list[tuple[str, tuple[int, ...], torch.dtype, qaxis.Budget, int]] = []
    for i, (dim, dtype, kind) in enumerate(itertools.product(DIMS, DTYPES, KINDS)):
        (h, kv), (m, n) = RATIOS[i % len(RATIOS)], EXTENTS[i % len(EXTENTS)]
        budget = qaxis.Budget(0.1, 5) if i % 2 else qaxis.Budget(0, 17)
        out.append((kind, (1 + i % 2, h, kv, m, n, dim), dtype, budget, i))
    for i, (n, dtype) in enumerate(itertools.product((8192, 131072), DTYPES)):
        out.append(("normal", (1, 2, 1, 1, n, 64), dtype, qaxis.Budget(0.05, 64), 1000 + i))
    named = []
    for kind, shape, dtype, budget, seed in out:
        b, h, kv, m, n, d = shape
        name = f"{str(dtype)[6:]} B{b} H{h}/{kv} M{m} N{n} D{d} {kind}"
        named.append((name, kind, shape, dtype, budget, seed))
    return named


def digest(x: torch.Tensor) -> str:
    """SHA-256 of shape and bits; indices as int64, numbers as float32 (exact for all three dtypes)."""
    x = x.float() if x.is_floating_point() else x
    return hashlib.sha256(str(tuple(x.shape)).encode() + x.cpu().contiguous().numpy().tobytes()).hexdigest()


def stages(qkv: tuple[torch.Tensor, ...], budget: qaxis.Budget, backend: str) -> dict[str, torch.Tensor]:
    """Scores (of the last query's selected keys), indices and output: enough to name the operation that differs."""
    q, k, v = qkv
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


def platforms(context: Context) -> list[tuple[str, str, str]]:
    """(name, device, backend) of what this machine can run."""
    found = [("NumPy", "cpu", "numpy"), ("PyTorch CPU", "cpu", "reference")]
    if context.device != "cpu":
        return [*found, ("PyTorch CUDA", context.device, "reference"), ("Triton GPU", context.device, "triton")]
    return found if find_spec("triton") is None else [*found, ("Triton interpreter", "cpu", "triton")]


def golden(context: Context) -> Result:
    """Recompute every digest on every platform of this machine; NumPy says where a difference is."""
    expected = json.loads(GOLDEN.read_text("utf-8"))
    # The stride shares no factor with the periods of the grid, so that a quick run meets every extent and kind.
    plan = cases()[::13] + cases()[5::13] + cases()[162:163] if context.quick else cases()
    names = [name for name, _, _ in platforms(context)]
    wrong: list[str] = []
    count = dict.fromkeys(names, 0)
    rows: dict[str, dict[str, Any]] = {}
    gap, differ, indices = 0.0, 0, 0
    for name, kind, shape, dtype, budget, seed in context.progress(plan, "golden digests"):
        made = make(kind, shape, dtype, seed)
        right = expected["cases"].get(name, {})
        extent = "N >= 8192" if shape[4] >= 8192 else f"D = {shape[5]}"
        row = rows.setdefault(
            f"{str(dtype)[6:]} {extent}",
            {"dtype": str(dtype)[6:], "shapes": extent, "cases": 0, "gap": 0.0, "differ": 0,
             "equal": dict.fromkeys(names, 0), "sha256": hashlib.sha256()},
        )  # fmt: skip
        row["cases"] += 1
        row["sha256"].update("".join(right.get(s, "missing") for s in STAGES).encode())
        kept: dict[str, torch.Tensor] = {}
        for platform, device, backend in platforms(context):
            got = stages(tuple(x.to(device) for x in made), budget, backend)
            bad = [s for s in STAGES if digest(got[s]) != right.get(s)]
            count[platform] += not bad
            row["equal"][platform] += not bad
            if bad:
                where = first_difference(kept[bad[0]], got[bad[0]]) if kept else "this is the witness itself"
                wrong.append(f"{platform}, {name}: {bad[0]} differ from the committed digest, {where}")
            if kept:
                largest = float((kept["output"].double() - got["output"].cpu().double()).abs().max())
                row["gap"] = gap = max(gap, largest)
                unequal = int((kept["indices"] != got["indices"].cpu()).sum())
                row["differ"], differ, indices = (
                    row["differ"] + unequal,
                    differ + unequal,
                    indices + kept["indices"].numel(),
                )
            kept = kept or got
    samples = {"PyTorch": canonical.exp2(exp2_sample()), "NumPy": torch.from_numpy(witness.exp2(exp2_sample().numpy()))}
    for platform, sample in samples.items():
        if digest(sample) != expected["exp2_sample"]:
            wrong.append(f"{platform}: exp2 of the sampled inputs, {first_difference(sample, samples['NumPy'])}")
    compared = len(plan) * len(names)
    values = {
        "equal": value(sum(count.values()), "digests x platforms", n=compared),
        "differing": value(len(wrong), "digests x platforms", n=compared),
        "cases": value(len(plan), "cases", n=len(plan)),
        "platforms": value(len(count), "platforms"),
        "max_difference": value(gap, "", n=compared),
        "agreement": value(1 - differ / max(indices, 1), "", n=indices),
    }
    headline = ", ".join(f"{name}: {n}/{len(plan)}" for name, n in count.items())
    table = [{**row, "sha256": row["sha256"].hexdigest()} for row in rows.values()]
    return Result(
        not wrong, wrong[0] if wrong else "all digests equal", headline, values, compared,
        {"count": count, "rows": table}, [case[0] for case in plan],
    )  # fmt: skip


def exp2_sample(stride: int = 4093) -> torch.Tensor:
    """Every ``stride``-th float32 in [-150, 128], by bit pattern."""
    positive = torch.arange(0, 0x43000000, stride, dtype=torch.int64)
    negative = torch.arange(0x80000000, 0xC3160000, stride, dtype=torch.int64) - (1 << 32)
    return torch.cat([positive, negative]).to(torch.int32).view(torch.float32)


def make_golden() -> dict[str, Any]:
    """The digests as the CPU reference computes them; committed once, confirmed everywhere else."""
    table = {}
    for name, kind, shape, dtype, budget, seed in cases():
        got = stages(make(kind, shape, dtype, seed), budget, "reference")
        table[name] = {s: digest(got[s]) for s in STAGES}
    return {"arithmetic": canonical.VERSION, "cases": table, "exp2_sample": digest(canonical.exp2(exp2_sample()))}


def _gpu(context: Context) -> None:
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")


def splits(context: Context) -> Result:
    """Block sizes, warps, batch place and key order change no bit; decode and chunks are rows of prefill."""
    from qaxis.attention import triton as kernels

    _gpu(context)
    wrong: list[str] = []
    checks: list[str] = []

    def same(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        checks.append(what)
        if not torch.equal(a.float().view(torch.int32), b.float().view(torch.int32)):
            wrong.append(f"{what}: {first_difference(a, b)}")

    plan = list(itertools.product(DTYPES, DIMS, RATIOS))
    for i, (dtype, dim, (h, kv)) in enumerate(context.progress(plan, "splits")):
        name = f"{dtype} D{dim} H{h}/{kv}"
        q, k, v = (x.to(context.device) for x in make("normal", (3, h, kv, 8, 700, dim), dtype, 5000 + i))
        budget = qaxis.Budget(0.3, 40)
        whole = qaxis.topk_attention(q, k, v, budget, backend="triton")
        for block, combine, warps in ((16, 2, 1), (32, 16, 8), (128, 64, 2), (256, 8, 4)):
            if block * dim > 1 << 15:
                continue
            out = kernels.attend(q, k, v, whole.indices, dim**-0.5, block=block, combine_block=combine, num_warps=warps)
            same(f"{name} blocks {block}/{combine} warps {warps}", whole.output, out)
            score = kernels.scores(q, k, block=block, num_warps=warps)
            same(f"{name} scores, block {block}", kernels.scores(q, k), score)
        alone = qaxis.topk_attention(q[2:], k[2:], v[2:], budget, backend="triton")
        same(f"{name} place in the batch", whole.output[2:], alone.output)
        last = qaxis.topk_attention(q[:, :, -1:], k, v, budget, backend="triton")
        same(f"{name} decode against prefill", whole.output[:, :, -1:], last.output)
        first = qaxis.topk_attention(q[:, :, :5], k[:, :, :-3], v[:, :, :-3], budget, backend="triton")
        same(f"{name} chunked prefill", whole.output[:, :, :5], first.output)
        order = torch.randperm(700, generator=torch.Generator().manual_seed(i)).to(context.device)
        every = qaxis.topk_indices(q, k[:, :, order], 40, causal=False, backend="triton")
        plain = qaxis.topk_indices(q, k, 40, causal=False, backend="triton")
        same(f"{name} permuted keys: set", plain, order[every].sort(-1).values)
        same(f"{name} permuted keys: scores", kernels.scores(q, k)[..., order], kernels.scores(q, k[:, :, order]))
        groups = torch.arange(kv, device=context.device).flip(0)
        heads = torch.arange(h, device=context.device).reshape(kv, -1).flip(0).reshape(-1)
        turned = qaxis.topk_attention(q[:, heads], k[:, groups], v[:, groups], budget, backend="triton")
        same(f"{name} permuted heads", whole.output[:, heads], turned.output)
    tried = len(checks)
    values = {"equal": value(tried - len(wrong), "comparisons", n=tried), "differing": value(len(wrong), "", n=tried)}
    verdict = wrong[0] if wrong else "no bit changed"
    headline = f"{tried - len(wrong)} of {tried} comparisons equal"
    return Result(not wrong, verdict, headline, values, tried, checks=checks)


def real_tensors(context: Context) -> Result:
    """Queries, keys and values of the model at N = 8192: PyTorch CPU, PyTorch CUDA and Triton GPU, bit for bit."""
    _gpu(context)
    tokens = 512 if context.quick else 8192
    ids = context.texts(1, tokens)[0]
    model = context.subjects.model
    keep = {0, 1, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1}
    captured: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        if layer in keep:
            captured.append((layer, q[:, :, -16:].clone(), k.clone(), v.clone()))

    with torch.inference_mode(), qaxis.observe_attention(model, observe):
        model.get_decoder()(input_ids=ids, use_cache=False)
    plan = list(itertools.product(captured, DTYPES, (1, 2, 16)))
    wrong, checks = [], []
    for (layer, q, k, v), dtype, m in context.progress(plan, "layers x dtypes x queries"):
        qkv = tuple(x.to(dtype) for x in (q[:, :, -m:], k, v))
        checks.append(f"layer {layer}, {str(dtype)[6:]}, M={m}, N={tokens}")
        right = stages(tuple(x.cpu() for x in qkv), qaxis.Budget(), "reference")
        for platform, backend in (("PyTorch CUDA", "reference"), ("Triton GPU", "triton")):
            got = stages(qkv, qaxis.Budget(), backend)
            bad = [s for s in STAGES if digest(got[s]) != digest(right[s])]
            if bad:
                wrong.append(f"{platform}, {checks[-1]}: {bad[0]}, {first_difference(right[bad[0]], got[bad[0]])}")
    values = {
        "cases": value(len(plan), "cases", n=len(plan)), "tokens": value(tokens, "tokens"),
        "differing": value(len(wrong), "cases x platforms", n=2 * len(plan)),
    }  # fmt: skip
    headline = f"{2 * len(plan) - len(wrong)} of {2 * len(plan)} equal at N = {tokens}"
    return Result(not wrong, wrong[0] if wrong else "bitwise equal", headline, values, 2 * len(plan), checks=checks)


def exp2_exhaustive(context: Context) -> Result:
    """Every float32 in [-150, 128]: distance from the correctly rounded 2^t, and Triton against PyTorch."""
    from qaxis.arithmetic.triton import exp2_of

    _gpu(context)
    worst = differ = total = 0
    step = 1 << 25
    starts = [*range(0, 0x43000000, step), *range(0x80000000, 0xC3160000, step)]
    for start in context.progress(starts, "float32 inputs"):
        stop = min(start + step, 0x43000000 if start < 0x80000000 else 0xC3160000)
        patterns = torch.arange(start, stop, dtype=torch.int64, device=context.device)
        t = torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns).to(torch.int32).view(torch.float32)
        ours = canonical.exp2(t)
        right = torch.exp2(t.double()).float()
        # Positive floats: the distance in ulp is the distance of the bit patterns.
        gap = (ours.view(torch.int32).to(torch.int64) - right.view(torch.int32).to(torch.int64)).abs()
        worst = max(worst, int(gap.max()))
        differ += int((exp2_of(t).view(torch.int32) != ours.view(torch.int32)).sum())
        total += t.numel()
    values = {
        "worst": value(worst, "ulp", n=total), "inputs": value(total, "inputs", n=total),
        "differing": value(differ, "inputs", n=total),
    }  # fmt: skip
    headline = f"at most {worst} ulp over {total} inputs; Triton differs from PyTorch on {differ}"
    return Result(worst <= 2 and differ == 0, "within 2 ulp, equal bits", headline, values, total)


def ablation(context: Context) -> Result:
    """Turn each rule off and count the output elements that then differ between two correct computations."""
    from qaxis.attention import triton as kernels

    _gpu(context)
    q, k, v = make("normal", (2, 8, 2, 4, 4096, 128), torch.float32, 77)
    gq, gk, gv = (x.to(context.device) for x in (q, k, v))
    index = qaxis.topk_indices(q, k, 1024)
    gindex = index.to(context.device)
    score = qaxis.canonical_scores(q, k).gather(-1, index)
    top = score.amax(-1, keepdim=True)
    x = (score - top) * 128**-0.5
    grouped = v.repeat_interleave(4, 1)
    rows: list[list[Any]] = []

    def count(rule: str, compared: str, a: torch.Tensor, b: torch.Tensor) -> None:
        rows.append([rule, compared, int((a.cpu() != b.cpu()).sum()), a.numel()])

    by_pytorch = reference.attend(q, k, v, index, Logits(128**-0.5))
    count("all rules on", "PyTorch CPU, Triton GPU", by_pytorch, kernels.attend(gq, gk, gv, gindex, 128**-0.5))
    count(
        "contraction allowed (scores)",
        "Triton GPU, fused or not",
        kernels.scores(gq, gk),
        kernels.scores(gq, gk, fuse=True),
    )
    count("library exp", "PyTorch CPU, PyTorch CUDA", torch.exp(x), torch.exp(x.to(context.device)))
    group = gq.reshape(2, 2, -1, 128)
    count(
        "library order of sums (scores)", "PyTorch CPU, PyTorch CUDA",
        q.reshape(2, 2, -1, 128) @ k.transpose(-1, -2), group @ gk.transpose(-1, -2),
    )  # fmt: skip
    weights = torch.zeros(2, 8, 4, 4096).scatter(-1, index, canonical.exp2(x * canonical.LOG2_E))
    count(
        "library order of sums (output)",
        "PyTorch CPU, PyTorch CUDA",
        weights @ grouped,
        weights.to(gq.device) @ grouped.to(gq.device),
    )
    count("split-K with rescaling", "one split, four splits", *(_split_k(score, grouped, index, n) for n in (1, 4)))
    # The two rows on the order of sums are one rule: a library may happen to agree in one of them.
    on, contracted, exponential, order_scores, order_output, split = (r[2] for r in rows)
    expected = on == 0 and min(contracted, exponential, order_scores + order_output, split) > 0
    values = {f"rule{i}": value(r[2], "elements", n=r[3]) for i, r in enumerate(rows)}
    headline = "; ".join(f"{r[0]}: {r[2]}/{r[3]}" for r in rows)
    return Result(
        expected, "rules on: 0; each rule off: some", headline, values, len(rows), {"rows": rows}, [r[0] for r in rows]
    )


def _split_k(score: torch.Tensor, v: torch.Tensor, index: torch.Tensor, parts: int) -> torch.Tensor:
    """Flash-decoding's combination: every split subtracts its own maximum and is rescaled when joined."""
    chosen = v[:, :, None].expand(-1, -1, index.shape[2], -1, -1)
    chosen = chosen.gather(3, index[..., None].expand(-1, -1, -1, -1, v.shape[-1]))
    weight = torch.zeros_like(score[..., :1])
    total, top = torch.zeros_like(chosen[..., 0, :]), torch.full_like(weight, -torch.inf)
    for s, w in zip(score.chunk(parts, -1), chosen.chunk(parts, 3), strict=True):
        new = torch.maximum(top, s.amax(-1, keepdim=True))
        p, old = torch.exp((s - new) * 128**-0.5), torch.exp((top - new) * 128**-0.5)
        total = total * old + (p[..., None, :] @ w)[..., 0, :]
        weight, top = weight * old + p.sum(-1, keepdim=True), new
    return total / weight


def sanitizer(context: Context) -> Result:
    """compute-sanitizer on small shapes, with PyTorch's allocator out of the way."""
    _gpu(context)
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        raise NotRunError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    script = (
        "import torch, qaxis; from selfcheck.inputs.seeded import make\n"
        "for s in ((1,3,1,1,130,64),(1,2,2,5,5,80),(2,4,1,1,257,32)):\n"
        "  q,k,v = (x.cuda() for x in make('normal', s, torch.bfloat16, 3))\n"
        "  qaxis.topk_attention(q,k,v,qaxis.Budget(0.1,5),backend='triton')\n"
        "torch.cuda.synchronize()"
    )
    said: dict[str, str] = {}
    for kind in context.progress(("memcheck", "racecheck"), "sanitizer"):
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = children.run(script, under=[tool, "--tool", kind], timeout=240, env=env)
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        said[kind] = lines[-1].strip("= ") if lines else (done.stdout + done.stderr)[-200:]
    clean = "ERROR SUMMARY: 0 errors" in said["memcheck"] and "(0 errors, 0 warnings)" in said["racecheck"]
    headline = "; ".join(f"{kind}: {line}" for kind, line in said.items())
    return Result(
        clean, "clean" if clean else "errors", headline, {"tools": value(len(said), "tools")}, 2, {"said": said},
        list(said),
    )  # fmt: skip
