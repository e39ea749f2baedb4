"""Turn evidence into numbers.tex: every measured number of the paper is a macro \\qx{claim.value}."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT

PLATFORMS = ("NumPy", "PyTorch CPU", "PyTorch CUDA", "Triton interpreter", "Triton GPU")
#: what of the versions stands in the table of evidence
SHORT = ("python", "torch", "triton", "transformers")
#: kinds of keys, and what a cache without lines to write back is called, in rows of certified-speed
INDEPENDENT, CLEAN = "independent", "clean"
KINDS = (INDEPENDENT, "correlated", "uneven")
WAYS = {"keys": "keys", "codes": "codes", "cache": "INT8 cache"}
Records = dict[str, dict[str, Any]]


@lru_cache(maxsize=1)
def _shown() -> dict[str, dict[str, str]]:
    """Of every claim, how its values are printed: {pattern of names: format}."""
    return {claim["id"]: claim.get("show", {}) for claim in seal.claims()}


def show(key: str, x: float) -> str:
    """One number ``claim.value`` as TeX, as the claim says; a count, or a whole number without a format, as a count."""
    if isinstance(x, int):
        return thousands(x)
    claim, _, name = key.partition(".")
    for pattern, form in _shown().get(claim, {}).items():
        if fnmatchcase(name, pattern):
            return printed(x, form)
    if x == int(x):
        return thousands(int(x))
    if 0.01 <= abs(x) < 10:
        return printed(x, "#.2g")
    mantissa, exponent = f"{x:.1e}".split("e")
    return rf"\ensuremath{{{mantissa}\cdot 10^{{{int(exponent)}}}}}"


def printed(x: float, form: str) -> str:
    """``x`` as Python formats it, its minus sign as TeX's."""
    return format(x, form).replace("-", r"\ensuremath{-}")


def thousands(n: int) -> str:
    return f"{n:,}".replace(",", r"\,")


def escape(text: str) -> str:
    """Plain text as TeX."""
    table = {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\textasciicircum{}", ">=": r"$\ge$", "|": "$|$"}
    table |= {"<": "$<$", ">": "$>$"}
    table.update({c: "\\" + c for c in "&%$#_{}"})
    return "".join(table.get(c, c) for c in re.split("(>=|.)", text))


def macros(records: Records, root: Path = ROOT) -> dict[str, str]:
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
        cards = [record["device"], *(other["device"] for other in record.get("other_cards", []))]
        out[f"{claim}.device"] = escape(" and ".join(cards))
        out[f"{claim}.status"] = escape(record["status"])
    for claim_entry in [*seal.claims(root), *seal.reported(root)]:
        out[f"{claim_entry['id']}.published"] = escape(claim_entry["published"])
    for kind, subject in seal.subjects(root).items():
        out[f"{kind}.name"] = escape(subject["name"])
        out[f"{kind}.requirement"] = escape(subject["requirement"])
        out[f"{kind}.sha"] = escape(subject["sha256"][:16])
    for name, rows in TABLES.items():
        with evidence.understood(f"table {name} of the paper"):
            out[f"table.{name}"] = r"\\".join(rows(records))
    with evidence.understood("proofs"):
        out["proofs.version"] = escape(records["proofs"]["data"]["coq"])
    out["checks.total"] = thousands(sum(len(set(r["checks"])) for r in records.values()))
    for name, claim in (("versions", "thm1"), ("gpu.versions", "golden-gpu")):
        out[name] = escape(_versions(records[claim]))
    out["content.whole"] = evidence.content_root(evidence.every(records), root)
    out["content"] = out["content.whole"][:16]
    out["date"] = escape(max(record["time"] for record in records.values())[:10])
    return out


def _versions(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


# ---- Bodies of the tables whose rows are data: one TeX row an entry ---------------------------


def _stops(records: Records) -> list[str]:
    return [f"{escape(r['stop'])} & {escape(r['case'])}" for r in records["thm1-stops"]["data"]["counterexamples"]]


def _ablation(records: Records) -> list[str]:
    return [
        f"{escape(r['rule'])} & {escape(r['compared'])} & {thousands(r['differing'])} of {thousands(r['elements'])}"
        for r in records["ablation"]["data"]["rows"]
    ]


def _bits(records: Records) -> list[str]:
    rows = []
    for here, gpu in zip(records["golden"]["data"]["rows"], records["golden-gpu"]["data"]["rows"], strict=True):
        equal = {**gpu["equal"], **here["equal"]}
        shares = " & ".join(f"{equal[p]:d}/{here['cases']:d}" for p in PLATFORMS)
        gap, differ = max(here["gap"], gpu["gap"]), here["differ"] + gpu["differ"]
        rows.append(
            f"{escape(here['dtype'])} & {escape(here['shapes'])} & {shares} & {gap:g} & {differ:d} & "
            f"\\texttt{{{escape(here['sha256'][:12])}}}"
        )
    return rows


def _changes(records: Records) -> list[str]:
    rows = []
    for r in records["fp-real"]["data"]["rows"]:
        shares = " & ".join(show("fp-real.share", 100 * r[other] / r["queries"]) for other in ("unit", "bf16"))
        rows.append(f"{escape(r['dtype'])} & {thousands(r['queries'])} & {shares}")
    return rows


def _flags(records: Records) -> list[str]:
    return [
        f"{place} & {escape(r['dtype'])} & {escape(r['implementation'])} & "
        + " & ".join(f"{r['gaps'][use]:g}" for use in records[claim]["data"]["uses"])
        for claim, place in (("flag-off", "CPU"), ("flag-off-gpu", "GPU"))
        for r in records[claim]["data"]["rows"]
    ]


def _families(records: Records) -> list[str]:
    return [
        f"{escape(r['family'])} & {escape(r['particular'])} & {r['off']:g} & {r['every_key']:g} & "
        + " & ".join(show("families.ratio", r[what]) for what in ("dense", "decode"))
        + f" & {r['wrong']:d} of {thousands(r['rows'])}"
        for r in records["families"]["data"]["rows"]
    ]


def _reason(sentence: str) -> str:
    """What the library's sentence says of a model, without what it says of all and the name of the class."""
    about = re.search(r"; \w+ ((?:adds|passes|computes) .*?), which", sentence)
    return about[1] if about else re.sub(r"^allowed is ", "not ", sentence)


def _architectures(records: Records) -> list[str]:
    """Outcome by outcome: what they have in common, how many, and their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for r in records["architectures"]["data"]["rows"]:
        about = r["kind"] if r["outcome"] == "equal" else _reason(r["reason"])
        groups.setdefault((r["outcome"], about), []).append(r["model_type"])
    order = ("equal", "refused", "not built")
    found = sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -len(item[1]), item[0][1]))
    return [
        f"{escape(outcome)} & {escape(about)} & {len(names)} & {escape(', '.join(sorted(set(names))))}"
        for (outcome, about), names in found
    ]


#: by the number of layers, what was timed
MODELS = {8: "Llama shape, 8 layers", 30: "SmolLM2-135M", 32: "Llama shape, 32 layers"}
DENSE = ("dynamic", "static", "compiled")
SPARSE = ("codes-2048", "codes-0.02", "codes-0.1")
COMPILED = "codes-2048+compiled"


def _speed(records: Records) -> list[str]:
    """Milliseconds a token by model and length: dense ways, the floor, budgets, and how those compare."""
    record = records["generation-speed"]["data"]
    sizes: dict[tuple[int, int], dict[str, float]] = {}
    for r in record["rows"]:
        sizes.setdefault((r["layers"], r["tokens"]), {})[r["way"]] = r["ms"]
    ratios = {(r["layers"], r["tokens"], r["way"], r["against"]): r["ratio"] for r in record["ratios"]}
    rows = []
    for (layers, tokens), took in sorted(sizes.items()):
        ideal = min(ms for name, ms in took.items() if name.startswith("graph-") and name != "graph-none")
        cells = [took.get(name) for name in DENSE] + [ideal, took.get("graph-none")] + [took.get(x) for x in SPARSE]
        best = [ratios[layers, tokens, COMPILED, "transformers"], ratios[layers, tokens, SPARSE[0], "ideal"]]
        rows.append(
            f"{escape(MODELS[layers])} & {thousands(tokens)} & "
            + " & ".join("--" if ms is None else f"{ms:.2f}" for ms in cells)
            + f" & {best[0]:.1f} & {best[1]:.2f}"
        )
    return rows


def _targets(records: Records) -> list[str]:
    """Every target of checks.toml: what was to be reached, the worst that was measured, and whether it is."""
    rows = []
    for claim in seal.claims():
        for target in claim.get("targets", []):
            values = records[claim["id"]]["values"]
            found = [v["value"] for name, v in values.items() if fnmatchcase(name, target["values"])]
            worst, sign = (min(found), r"$\ge$") if "least" in target else (max(found), r"$\le$")
            asked = target.get("least", target.get("most"))
            met = worst >= asked if "least" in target else worst <= asked
            rows.append(f"{escape(target['says'])} & {sign}\\,{asked:g} & {worst:.2f} & {'met' if met else 'missed'}")
    return rows


def _caches(records: Records) -> list[str]:
    together = {r["format"]: r for r in records["kv-combined"]["data"]["rows"]}
    memory, rows = records["kv-memory"]["values"], []
    for r in records["kv-speed"]["data"]["rows"]:
        name = r["cache"]
        held = " & ".join(f"{memory[f'{name}_{what}']['value'] / 2**20:.1f}" for what in ("kept", "prompt", "steps"))
        costs, ideal = ["--"] * 3, "--" if r["ideal"] is None else f"{r['ideal']:.1f}"
        if name in together:
            costs = [show("kv-combined.change", together[name][what]["change"]) for what in ("sum", "both", "beyond")]
            ends = [show("kv-combined.change", together[name]["beyond"][end]) for end in ("low", "high")]
            costs[-1] += f" [{', '.join(ends)}]"
        rows.append(
            f"{escape(name.replace('int', 'INT'))} & {held} & "
            f"{r['dense']:.1f} & {ideal} & {r['qaxis']:.1f} & {r['agreed']:.0f} & {' & '.join(costs)}"
        )
    return rows


def _formats(records: Records) -> list[str]:
    rows = []
    for r in records["kv-formats"]["data"]["rows"]:
        change = (printed(r[x], "+.2f" if abs(r[x]) >= 100 else "+.3f") for x in ("change", "low", "high"))
        percent, low, high = change
        same = f"{r['same']:.1f}" if r["same"] is not None else "--"
        protocol = ", whole window" if r["protocol"] != "decoding" else ""
        rows.append(
            f"{escape(r['format'])}{protocol} & {r['texts']:d} & {r['ratio']:.4f} & {percent} & [{low}, {high}] & "
            f"{r['gap']:.1f} & {r['top1']:.1f} & {same}"
        )
    return rows


def _format_lengths(records: Records) -> list[str]:
    lengths: dict[int, list[str]] = {}
    for r in records["kv-formats"]["data"]["lengths"]:
        percent, low, high = (printed(r[x], "+.3f") for x in ("change", "low", "high"))
        lengths.setdefault(r["tokens"], []).append(f"{percent} [{low}, {high}]")
    return [f"{n} & " + " & ".join(cells) for n, cells in lengths.items()]


def _certified(records: Records) -> list[str]:
    rows = []
    for r in _of_keys(records, INDEPENDENT):
        # Where the CUDA kernels do not run, the step is the Triton one.
        cuda = f"{r['took']:.0f}" if r["took"] != r["triton"] else "--"
        rows.append(
            f"{r['batch']:d} & {thousands(r['n'])} & {thousands(r['k_eff'])} & {WAYS[r['way']]} & "
            f"{escape(_in_short(r['best']))} & {r['dense']:.0f} & {r['dense_8bit']:.0f} & {r['triton']:.0f} & "
            f"{cuda} & {_within(r)} & {r['floor']:.0f} & {thousands(round(r['rescored']))}"
        )
    return rows


#: columns of the table of selections: the ways that it has beside ours, of those of a kind the first that is there
OTHERS = (
    ("torch.topk",), ("torch.topk unsorted",), ("torch.sort stable",),
    ("flashinfer lower first", "flashinfer deterministic", "flashinfer"), ("sglang",),
)  # fmt: skip


def _topk(records: Records) -> list[str]:
    """Microseconds of every shape and kind of scores: ours, the others, the floor."""
    took: dict[tuple[int, int, int, str], dict[str, float]] = {}
    for r in records["topk-speed"]["data"]["rows"]:
        took.setdefault((r["rows"], r["n"], r["k"], r["kind"]), {"floor": r["floor"]})[r["way"]] = r["took"]
    return [
        f"{thousands(count)} & {thousands(n)} & {thousands(k)} & {escape(kind)} & "
        + " & ".join(
            next((f"{ways[way]:.0f}" for way in same if way in ways), "--")
            for same in (("qaxis",), ("qaxis by rank",), *OTHERS)
        )
        + f" & {ways['floor']:.1f}"
        for (count, n, k, kind), ways in took.items()
    ]


def _in_short(step: str) -> str:
    """Whose dense step it is, without how it splits or packs, and without the package that carries it."""
    return step.split(",")[0].split(" (")[0].removesuffix(" SDPA")


def _of_keys(records: Records, *kinds: str) -> list[dict[str, Any]]:
    """Rows of the certified step over keys of some kinds."""
    return [r for r in records["certified-speed"]["data"]["rows"] if r["keys"] in kinds]


def _within(r: dict[str, Any], name: str = "ratio", suffix: str = "") -> str:
    """A ratio and its interval."""
    return f"{r[name + suffix]:.2f} [{r['low' + suffix]:.2f}, {r['high' + suffix]:.2f}]"


def _flushes(records: Records) -> list[str]:
    """Ratios by what was in the cache before a step, of every kind of keys."""
    rows = []
    for r in _of_keys(records, *KINDS):
        coded = (_within(x, "ratio", "_8bit") if r["way"] == "cache" else "--" for x in (r, r[CLEAN]))
        rows.append(
            f"{r['batch']:d} & {thousands(r['n'])} & {thousands(r['k_eff'])} & {r['keys']} & {WAYS[r['way']]} & "
            f"{_within(r)} & {_within(r[CLEAN])} & {' & '.join(coded)} & {thousands(round(r['rescored']))}"
        )
    return rows


def _prefill(records: Records) -> list[str]:
    """Milliseconds of a prompt by its length, and ratios to FlashAttention-2."""
    rows = []
    for r in records["prefill-speed"]["data"]["rows"]:
        took = " & ".join(f"{r['took'][name]:.2f}" for name in ("flash", "cudnn", "tenth", "fixed"))
        ratios = " & ".join(_within(r["ratios"][name], "value") for name in ("tenth", "fixed"))
        rows.append(f"{thousands(r['n'])} & {took} & {ratios} & {r['repeats']:d}")
    return rows


#: how a completion is called, by its name in rows of completion-curve; a rival's line has its own approximate masses
COMPLETED = {
    "none": "--", "mean": "mean", "block 64": "blocks of 64", "linear": "line", "own mass": "line", "SparQ": "its own",
}  # fmt: skip


def _column(row: dict[str, Any]) -> int | None:
    """Of the table of the curve: a twentieth, a tenth or the bytes of its line, the same in 8 bits."""
    if row["budget"] == "coverage" and row["at"] == 0.05:
        return 0
    if row["budget"] in ("coverage", "bytes") and row["at"] == 0.1:
        return 2 if row["stored"] else 1
    return None


def _curve(records: Records) -> list[str]:
    """By what selects and completes: cost, of 16 bits the bytes, and keys where they differ; :func:`_column`."""
    order = list(COMPLETED)
    found: dict[tuple[str, str], list[str]] = {}
    for r in records["completion-curve"]["data"]["rows"]:
        column = _column(r)
        if column is not None:
            percent, low, high = (show(f"completion-curve.{r['way']}", r[x]) for x in ("change", "low", "high"))
            kept, share = thousands(round(r["kept"])), f"{r['share']:.2f}"
            before = ([share], [kept, share], [])[column]
            cells = found.setdefault((r["selection"], r["completion"]), ["& ", "& & ", ""])
            cells[column] = " & ".join([*before, f"{percent} [{low}, {high}]"])
    selections = list(dict.fromkeys(selection for selection, _ in found))
    ways = sorted(found, key=lambda way: (selections.index(way[0]), order.index(way[1])))
    return [" & ".join((escape(a), escape(COMPLETED[b]), *found[a, b])) for a, b in ways]


def _approximate(records: Records) -> list[str]:
    recall = records["certified-real"]["data"]["recall"]
    rows = []
    for r in records["certified-speed"]["data"]["peers"]:
        kind = r["name"].split(",")[0]
        # The ways differ between the two claims in how many of the head's dimensions are a quarter.
        (real,) = (found for name, found in recall.items() if name.split(",")[0] == kind)
        rows.append(f"{escape(kind)} & {r['share']:g} & {100 * r['recall']:.1f} & {100 * real:.1f} & {r['took']:.0f}")
    return rows


def _evidence(records: Records) -> list[str]:
    """Where and when each claim was measured: by the newest run on a CPU, which anybody repeats, or before it."""
    every = evidence.every(records)
    newest = max((r.get("run", "") for r in every if "CPU" in r["device"]), default="")
    return [
        f"{escape(r['claim'])} & {'this run' if newest and r.get('run') == newest else 'committed'} & "
        f"{escape(r['time'][:10])} & {escape(r['device'])} & {escape(_versions_in_short(r))}"
        for r in every
    ]


def _versions_in_short(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {record['versions'][name]}" for name in SHORT if name in record["versions"])


TABLES: dict[str, Callable[[Records], list[str]]] = {
    "stops": _stops, "ablation": _ablation, "bits": _bits, "changes": _changes, "flags": _flags,
    "families": _families, "architectures": _architectures, "speed": _speed, "targets": _targets, "caches": _caches,
    "formats": _formats, "formatlengths": _format_lengths, "certified": _certified, "flushes": _flushes,
    "prefill": _prefill, "topk": _topk, "approximate": _approximate, "curve": _curve, "evidence": _evidence,
}  # fmt: skip


def render(records: Records, root: Path = ROOT) -> str:
    lines = [rf"\qxset{{{key}}}{{{text}}}" for key, text in sorted(macros(records, root).items())]
    return "% Generated from selfcheck/evidence by paper/numbers.py; do not edit.\n" + "\n".join(lines) + "\n"


TARGET = "paper/numbers.tex"
