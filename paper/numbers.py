"""Turn evidence into numbers.tex: every measured number of the paper is a macro \\qx{claim.value}."""

from __future__ import annotations

import re
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT

PLATFORMS = ("NumPy", "PyTorch CPU", "PyTorch CUDA", "Triton interpreter", "Triton GPU")
#: decimals by claim.value, and by how its name begins
FORMATS: dict[str, int] = {
    "int8-bytes.ratio": 4, "int8-ppl.change": 3, "int8-ppl.dense_perplexity": 2, "int8-ppl.int8_perplexity": 2,
    "int8-ppl.canary": 0, "entropy.alpha": 3, "entropy.beta": 2, "entropy.r_squared": 3,
    "entropy.entropy_longest": 2, "entropy.support_longest": 1, "flag-off.on_difference": 1,
    **{f"certified-real.{x}_share": 1 for x in ("keys", "codes", "four")},
    "kv-formats.int8": 3, "kv-formats.int6": 3, "kv-formats.int4": 3,
    **{f"kv-formats.int{b}_ratio": 4 for b in (8, 6, 4)}, "decode-speed.best": 2, "decode-speed.worst": 2,
    "fp-order.closest": 2, "fp-ppl.sparse": 2, "fp-ppl.unit": 4, "fp-ppl.bf16": 4,
}  # fmt: skip
TWO_DECIMALS = ("dppl.change", "fp-real.", "kv-combined.", "certified-speed.", "prefill-speed.")
WAYS = {"keys": "keys", "codes": "codes", "cache": "INT8 cache"}
SIGNED = (
    "kv-formats.int",
    "kv-combined.",
    "int8-ppl.change",
    "int8-ppl.canary",
    "dppl.change",
    "fp-ppl.sparse",
    "fp-ppl.unit",
    "fp-ppl.bf16",
)


def show(key: str, x: float) -> str:
    """One number as TeX; a count, or what happens to be whole and has no format, with separators."""
    if isinstance(x, int):
        return thousands(x)
    digits = FORMATS.get(key, 2 if key.startswith(TWO_DECIMALS) else None)
    if digits is not None:
        sign = "+" if key.startswith(SIGNED) and not key.endswith("_ratio") else ""
        return f"{x:{sign}.{digits}f}".replace("-", r"\ensuremath{-}")
    if x == int(x):
        return thousands(int(x))
    mantissa, exponent = f"{x:.1e}".split("e")
    return rf"\ensuremath{{{mantissa}\cdot 10^{{{int(exponent)}}}}}"


def signed(x: float, digits: int) -> str:
    return f"{x:+.{digits}f}".replace("-", r"\ensuremath{-}")


def thousands(n: int) -> str:
    return f"{n:,}".replace(",", r"\,")


def escape(text: str) -> str:
    """Plain text as TeX."""
    table = {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\textasciicircum{}", ">=": r"$\ge$", "|": "$|$"}
    table |= {"<": "$<$", ">": "$>$"}
    table.update({c: "\\" + c for c in "&%$#_{}"})
    return "".join(table.get(c, c) for c in re.split("(>=|.)", text))


def macros(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every macro: values, interval ends, counts, published numbers, and where they were measured."""
    out: dict[str, str] = {}
    for claim, record in records.items():
        for name, v in record["values"].items():
            key = f"{claim}.{name}"
            out[key] = show(key, v["value"])
            for end in ("low", "high"):
                if v[end] is not None:
                    out[f"{key}.{end}"] = show(key, v[end])
            if v["n"] is not None:
                out[f"{key}.n"] = thousands(v["n"])
        out[f"{claim}.device"] = escape(record["device"])
        out[f"{claim}.status"] = escape(record["status"])
    for claim_entry in [*seal.claims(), *seal.reported()]:
        out[f"{claim_entry['id']}.published"] = escape(claim_entry["published"])
    for kind, subject in seal.subjects().items():
        out[f"{kind}.name"] = escape(subject["name"])
        out[f"{kind}.requirement"] = escape(subject["requirement"])
        out[f"{kind}.sha"] = subject["sha256"][:16]
    out.update(tables(records))
    out["proofs.version"] = escape(records["proofs"]["data"]["coq"])
    out["checks.total"] = thousands(sum(len(set(r["checks"])) for r in records.values()))
    for name, claim in (("versions", "thm1"), ("gpu.versions", "golden-gpu")):
        out[name] = escape(", ".join(f"{k} {v}" for k, v in records[claim]["versions"].items()))
    out["root"] = evidence.chain(list(records.values()))[1][:16]
    out["date"] = max(record["time"] for record in records.values())[:10]
    return out


def tables(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Bodies of the tables whose rows are data: one TeX row an entry."""
    counterexamples = [
        f"{escape(name)} & {escape(text)}" for name, text in records["thm1-stops"]["data"]["counterexamples"]
    ]
    ablation = [
        f"{escape(rule)} & {escape(between)} & {thousands(count)} of {thousands(total)}"
        for rule, between, count, total in records["ablation"]["data"]["rows"]
    ]
    here, gpu = records["golden"]["data"]["rows"], records["golden-gpu"]["data"]["rows"]
    bits = []
    for a, b in zip(here, gpu, strict=True):
        equal = {**b["equal"], **a["equal"]}
        shares = " & ".join(f"{equal[p]}/{a['cases']}" for p in PLATFORMS)
        gap, differ = max(a["gap"], b["gap"]), a["differ"] + b["differ"]
        bits.append(
            f"{a['dtype']} & {escape(a['shapes'])} & {shares} & {gap:g} & {differ} & \\texttt{{{a['sha256'][:12]}}}"
        )
    changes = []
    for dtype, queries, *changed in records["fp-real"]["data"]["rows"]:
        shares = " & ".join(show("fp-real.share", 100 * n / queries) for n in changed)
        changes.append(f"{dtype} & {thousands(queries)} & {shares}")
    bodies = {"stops": counterexamples, "ablation": ablation, "bits": bits, "changes": changes, **in_models(records)}
    return {f"table.{name}": r"\\".join(rows) for name, rows in bodies.items()}


def in_models(records: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Rows of the tables about models: off, families, decoding speed."""
    flags = [
        f"{place} & {dtype} & {implementation} & " + " & ".join(f"{gap:g}" for gap in gaps)
        for claim, place in (("flag-off", "CPU"), ("flag-off-gpu", "GPU"))
        for dtype, implementation, *gaps in records[claim]["data"]["rows"]
    ]
    families = [
        f"{escape(family)} & {escape(what)} & {off:g} & {between:g} & "
        + " & ".join(show("families.ratio", x) for x in (dense, decode))
        + f" & {wrong} of {thousands(rows)}"
        for family, what, off, between, dense, decode, wrong, rows in records["families"]["data"]["rows"]
    ]
    speed = [
        f"{escape(name)} & {thousands(tokens)} & {dense:.1f} & {sparse:.1f} & {ratio:.2f} & "
        f"{100 * dense_share:.0f} & {100 * sparse_share:.0f}"
        for name, tokens, dense, sparse, ratio, dense_share, sparse_share in records["decode-speed"]["data"]["rows"]
    ]
    together = {name: (total, both) for name, _, _, total, both, _ in records["kv-combined"]["data"]["rows"]}
    memory, caches = records["kv-memory"]["values"], []
    for name, dense, sparse, agreed in records["kv-speed"]["data"]["rows"]:
        kept, prompt, step = (memory[f"{name}_{what}"]["value"] / 2**20 for what in ("kept", "prompt", "steps"))
        costs = [show("kv-combined.change", x[0]) for x in together[name]] if name in together else ["--", "--"]
        caches.append(
            f"{name.replace('int', 'INT')} & {kept:.1f} & {prompt:.1f} & {step:.1f} & {dense:.1f} & {sparse:.1f} & "
            f"{agreed:.0f} & " + " & ".join(costs)
        )
    formats = []
    for name, protocol, n, ratio, *change, gap, top1, same in records["kv-formats"]["data"]["rows"]:
        percent, low, high = (show("kv-combined.change", x) if abs(x) >= 100 else signed(x, 3) for x in change)
        formats.append(
            f"{escape(name)}{', whole window' if protocol != 'decoding' else ''} & {n} & {ratio:.4f} & {percent} & "
            f"[{low}, {high}] & {gap:.1f} & {top1:.1f} & " + (f"{same:.1f}" if same is not None else "--")
        )
    lengths: dict[int, list[str]] = {}
    for n, _name, *change in records["kv-formats"]["data"]["lengths"]:
        percent, low, high = (signed(x, 3) for x in change)
        lengths.setdefault(n, []).append(f"{percent} [{low}, {high}]")
    by_length = [f"{n} & " + " & ".join(cells) for n, cells in lengths.items()]
    certified = [
        # Where the CUDA kernels do not run, the step is the Triton one.
        f"{b} & {thousands(n)} & {thousands(k)} & {WAYS[name]} & {escape(best)} & {dense:.0f} & {triton:.0f} & "
        f"{f'{took:.0f}' if took != triton else '--'} & {ratio:.2f} & {floor:.0f} & {thousands(round(rescored))}"
        for b, n, k, name, best, dense, took, ratio, floor, _, rescored, triton in (
            records["certified-speed"]["data"]["rows"]
        )
    ]
    recall = records["certified-real"]["data"]["recall"]
    # The ways differ between the two claims in how many of the head's dimensions are a quarter.
    approximate = [
        f"{escape(name.split(',')[0])} & {share:g} & {100 * found:.1f} & {100 * real:.1f} & {took:.0f}"
        for (name, found, share, took), real in zip(
            records["certified-speed"]["data"]["peers"],
            (recall[n] for kind in ("Quest", "SparQ", "Loki") for n in recall if n.startswith(kind)),
            strict=True,
        )
    ]
    return {
        "certified": certified, "approximate": approximate,
        "flags": flags, "families": families, "speed": speed, "caches": caches, "formats": formats,
        "formatlengths": by_length,
    }  # fmt: skip


def render(records: dict[str, dict[str, Any]]) -> str:
    lines = [rf"\qxset{{{key}}}{{{text}}}" for key, text in sorted(macros(records).items())]
    return "% Generated from selfcheck/evidence by paper/numbers.py; do not edit.\n" + "\n".join(lines) + "\n"


TARGET = ROOT / "paper/numbers.tex"
