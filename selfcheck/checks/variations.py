"""What only a GPU can vary: blocks and warps, the place of a query, tensors at full length, each rule turned off."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention import reference
from qaxis.attention.logits import Logits

from ..harness import children
from ..harness.claim import Context, NotRunError, Result, value
from ..inputs.adversarial import make
from ..inputs.capture import capture
from ..inputs.seeded import DTYPES
from .golden import DIMS, RATIOS, STAGES, digest, first_difference, stages

#: queries of the model's own tensors that are compared
QUERIES = (1, 2, 16)
SPLIT_BUDGET = qaxis.Budget(0.3, 40)
#: keys a program scores and attends to, partials it combines, warps
CUTS = ((16, 2, 1), (32, 16, 8), (128, 64, 2), (256, 8, 4))
#: most numbers of keys that a program of the splits holds; more would not fit its registers
MOST = 1 << 15


def _gpu(context: Context) -> None:
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")


def split_plan() -> list[tuple[torch.dtype, int, tuple[int, int], list[tuple[int, int, int]]]]:
    """(dtype, head_dim, heads and KV heads, cuts): every dtype with every dimension, the rest in turns.

    Each cut and each ratio meets every dtype, and each cut that fits meets every dimension. A kernel is compiled for
    every combination of dtype, dimension and cut, which takes longer than all comparisons: two cuts each.
    """
    plan = []
    for i, (dtype, dim) in enumerate(itertools.product(DTYPES, DIMS)):
        fits = [cut for cut in CUTS if cut[0] * dim <= MOST]
        turn = 2 * DTYPES.index(dtype) + DIMS.index(dim)
        plan.append((dtype, dim, RATIOS[i % len(RATIOS)], [fits[(turn + j) % len(fits)] for j in range(2)]))
    return plan


def splits(context: Context) -> Result:
    """Block sizes, warps, batch place and key order change no bit; decode and chunks are rows of prefill."""
    _gpu(context)
    wrong: list[str] = []
    checks: list[str] = []
    for i, (dtype, dim, ratio, cuts) in enumerate(context.progress(split_plan(), "splits")):
        name = f"{dtype} D{dim} H{ratio[0]}/{ratio[1]}"
        made = make("normal", (3, *ratio, 8, 700, dim), dtype, 5000 + i)
        q, k, v = (x.to(context.device) for x in made)
        for what, a, b in itertools.chain(_cut_otherwise(q, k, v, cuts), _placed_otherwise(q, k, v, i)):
            checks.append(f"{name} {what}")
            if not torch.equal(a.float().view(torch.int32), b.float().view(torch.int32)):
                wrong.append(f"{checks[-1]}: {first_difference(a, b)}")
    tried = len(checks)
    return Result(
        passed=not wrong,
        verdict=wrong[0] if wrong else "no bit changed",
        headline=f"{tried - len(wrong)} of {tried} comparisons equal",
        values={
            "equal": value(tried - len(wrong), "comparisons", n=tried),
            "differing": value(len(wrong), "", n=tried),
        },
        cases=tried,
        checks=checks,
    )


Compared = Iterator[tuple[str, torch.Tensor, torch.Tensor]]


def _cut_otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cuts: list[tuple[int, int, int]]) -> Compared:
    """(what, bits, bits that must be equal) for other blocks and warps."""
    from qaxis.attention import triton as kernels

    whole = qaxis.topk_attention(q, k, v, SPLIT_BUDGET, backend="triton")
    plain = kernels.scores(q, k)
    for block, combine, warps in cuts:
        logits = Logits(q.shape[3] ** -0.5)
        out = kernels.attend(q, k, v, whole.indices, logits, block=block, combine_block=combine, num_warps=warps)
        yield f"blocks {block}/{combine} warps {warps}", whole.output, out
        yield f"scores, block {block}", plain, kernels.scores(q, k, block=block, num_warps=warps)


def _placed_otherwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seed: int) -> Compared:
    """The same for another batch, other queries beside a query, other orders of keys and heads."""
    from qaxis.attention import triton as kernels

    whole = qaxis.topk_attention(q, k, v, SPLIT_BUDGET, backend="triton")
    alone = qaxis.topk_attention(q[2:], k[2:], v[2:], SPLIT_BUDGET, backend="triton")
    yield "place in the batch", whole.output[2:], alone.output
    last = qaxis.topk_attention(q[:, :, -1:], k, v, SPLIT_BUDGET, backend="triton")
    yield "decode against prefill", whole.output[:, :, -1:], last.output
    first = qaxis.topk_attention(q[:, :, :5], k[:, :, :-3], v[:, :, :-3], SPLIT_BUDGET, backend="triton")
    yield "chunked prefill", whole.output[:, :, :5], first.output
    n, (heads, kv_heads) = k.shape[2], (q.shape[1], k.shape[1])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(q.device)
    every = qaxis.topk_indices(q, k[:, :, order], 40, causal=False, backend="triton")
    plain = qaxis.topk_indices(q, k, 40, causal=False, backend="triton")
    yield "permuted keys: set", plain, order[every].sort(-1).values
    yield "permuted keys: scores", kernels.scores(q, k)[..., order], kernels.scores(q, k[:, :, order])
    groups = torch.arange(kv_heads, device=q.device).flip(0)
    turned_heads = torch.arange(heads, device=q.device).reshape(kv_heads, -1).flip(0).reshape(-1)
    turned = qaxis.topk_attention(q[:, turned_heads], k[:, groups], v[:, groups], SPLIT_BUDGET, backend="triton")
    yield "permuted heads", whole.output[:, turned_heads], turned.output


def _last_rows(all_rows: dict[str, torch.Tensor], m: int) -> dict[str, torch.Tensor]:
    """Of the last ``m`` queries; the scores are those of the last one either way."""
    return {s: x if s == "scores" else x[:, :, -m:] for s, x in all_rows.items()}


def real_tensors(context: Context) -> Result:
    """Queries, keys and values of the model at N = 8192: PyTorch CPU, PyTorch CUDA and Triton GPU, bit for bit."""
    _gpu(context)
    tokens = 512 if context.quick else 8192
    model, most = context.subjects.model, max(QUERIES)
    keep = {0, 1, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1}
    captured = capture(model, context.texts(1, tokens)[0], keep, queries=most)
    wrong: list[str] = []
    checks: list[str] = []
    for (layer, q, k, v), dtype in context.progress(list(itertools.product(captured, DTYPES)), "layers x dtypes"):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        # Once on the CPU: fewer queries are its last rows.
        rows = stages((q.cpu(), k.cpu(), v.cpu()), qaxis.Budget(), "reference")
        for m in QUERIES:
            checks.append(f"layer {layer}, {str(dtype)[6:]}, M={m}, N={tokens}")
            right = _last_rows(rows, m)
            for platform, backend in (("PyTorch CUDA", "reference"), ("Triton GPU", "triton")):
                got = stages((q[:, :, -m:], k, v), qaxis.Budget(), backend)
                bad = [s for s in STAGES if digest(got[s]) != digest(right[s])]
                if bad:
                    wrong.append(f"{platform}, {checks[-1]}: {bad[0]}, {first_difference(right[bad[0]], got[bad[0]])}")
    n = 2 * len(checks)
    return Result(
        passed=not wrong,
        verdict=wrong[0] if wrong else "bitwise equal",
        headline=f"{n - len(wrong)} of {n} equal at N = {tokens}",
        values={
            "cases": value(len(checks), "cases", n=len(checks)),
            "tokens": value(tokens, "tokens"),
            "differing": value(len(wrong), "cases x platforms", n=n),
        },
        cases=n,
        checks=checks,
    )


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
    return Result(
        passed=worst <= 2 and differ == 0,
        verdict="within 2 ulp, equal bits" if worst <= 2 and differ == 0 else "too far from 2^t, or other bits",
        headline=f"at most {worst} ulp over {total} inputs; Triton differs from PyTorch on {differ}",
        values=values,
        cases=total,
    )


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
    rows: list[dict[str, Any]] = []

    def count(rule: str, compared: str, a: torch.Tensor, b: torch.Tensor) -> None:
        differing = int((a.cpu() != b.cpu()).sum())
        rows.append({"rule": rule, "compared": compared, "differing": differing, "elements": a.numel()})

    logits = Logits(128**-0.5)
    by_pytorch = reference.attend(q, k, v, index, logits)
    count("all rules on", "PyTorch CPU, Triton GPU", by_pytorch, kernels.attend(gq, gk, gv, gindex, logits))
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
    on, contracted, exponential, order_scores, order_output, split = (r["differing"] for r in rows)
    expected = on == 0 and min(contracted, exponential, order_scores + order_output, split) > 0
    return Result(
        passed=expected,
        verdict="rules on: 0; each rule off: some" if expected else "bits differ with the rules on, or a rule is idle",
        headline="; ".join(f"{r['rule']}: {r['differing']}/{r['elements']}" for r in rows),
        values={f"rule{i}": value(r["differing"], "elements", n=r["elements"]) for i, r in enumerate(rows)},
        cases=len(rows),
        data={"rows": rows},
        checks=[r["rule"] for r in rows],
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
        "import torch, qaxis; from selfcheck.inputs.adversarial import make\n"
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
    return Result(
        passed=clean,
        verdict="clean" if clean else "errors",
        headline="; ".join(f"{kind}: {line}" for kind, line in said.items()),
        values={"tools": value(len(said), "tools")},
        cases=len(said),
        data={"said": said},
        checks=list(said),
    )
