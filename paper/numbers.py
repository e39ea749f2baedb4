"""Turn evidence into numbers.tex: every measured number of the paper is a macro \\qx{claim.value}."""

from __future__ import annotations

from typing import Any

from selfcheck import evidence, seal
from selfcheck.files import ROOT

#: decimals by claim.value; None prints an integer with separators, "sci" the shortest form
FORMATS: dict[str, int | None] = {
    "int8-bytes.ratio": 4, "int8-ppl.change": 3, "int8-ppl.dense_perplexity": 2, "int8-ppl.int8_perplexity": 2,
    "int8-ppl.canary": 0, "entropy.alpha": 3, "entropy.beta": 2, "entropy.r_squared": 3,
    "entropy.entropy_longest": 2, "entropy.support_longest": 1, "flag-off.on_difference": 1,
}  # fmt: skip
SIGNED = ("int8-ppl.change", "int8-ppl.canary", "dppl.change")


def show(key: str, x: float) -> str:
    """One number as TeX."""
    digits = FORMATS.get(key, 2 if key.startswith("dppl.change") else None)
    if digits is not None:
        sign = "+" if key.startswith(SIGNED) else ""
        return f"{x:{sign}.{digits}f}".replace("-", r"\ensuremath{-}")
    if x == int(x):
        return f"{int(x):,}".replace(",", r"\,")
    mantissa, exponent = f"{x:.1e}".split("e")
    return rf"\ensuremath{{{mantissa}\cdot 10^{{{int(exponent)}}}}}"


def escape(text: str) -> str:
    """Plain text as TeX."""
    table = {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$"}
    table.update({c: "\\" + c for c in "&%$#_{}"})
    return "".join(table.get(c, c) for c in text)


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
                out[f"{key}.n"] = f"{v['n']:,}".replace(",", r"\,")
        out[f"{claim}.device"] = escape(record["device"])
        out[f"{claim}.status"] = escape(record["status"])
    for claim_entry in [*seal.claims(), *seal.reported()]:
        out[f"{claim_entry['id']}.published"] = escape(claim_entry["published"])
    for kind, subject in seal.subjects().items():
        out[f"{kind}.name"] = escape(subject["name"])
        out[f"{kind}.requirement"] = escape(subject["requirement"])
        out[f"{kind}.sha"] = subject["sha256"][:16]
    first = next(iter(records.values()))
    out["versions"] = escape(", ".join(f"{k} {v}" for k, v in first["versions"].items()))
    out["root"] = evidence.chain(list(records.values()))[1][:16]
    out["date"] = max(record["time"] for record in records.values())[:10]
    return out


def render(records: dict[str, dict[str, Any]]) -> str:
    lines = [rf"\qxset{{{key}}}{{{text}}}" for key, text in sorted(macros(records).items())]
    return "% Generated from selfcheck/evidence by paper/numbers.py; do not edit.\n" + "\n".join(lines) + "\n"


TARGET = ROOT / "paper/numbers.tex"
