"""Run the checks of checks.toml one after another and turn their results into records."""

from __future__ import annotations

import datetime
import hashlib
import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import evidence, seal
from .claim import Context, NotRunError, Result
from .files import ROOT, SelfcheckError

PACKAGES = ("torch", "transformers", "triton", "hypothesis", "numpy", "scipy", "tokenizers", "gguf")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.system()} {platform.machine()} CPU, {torch.get_num_threads()} threads"


def find_check(name: str) -> Callable[[Context], Result]:
    """``module:function`` of selfcheck.checks."""
    module, function = name.split(":")
    return getattr(importlib.import_module(f"selfcheck.checks.{module}"), function)


def run_claim(claim: dict[str, Any], context: Context) -> dict[str, Any]:
    """Measure one claim; a check that raises is a failed claim, not a crash of the others.

    Raises:
        NotRunError: if this machine cannot measure it.
    """
    if claim.get("where") == "gpu" and context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    started = time.perf_counter()
    depends = seal.digests_of(claim)
    try:
        result = find_check(claim["check"])(context)
    except (SelfcheckError, NotRunError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:500]
        result = Result(passed=False, verdict=said, headline="did not finish", values={}, cases=0)
    loaded = context.__dict__.get("subjects")
    pinned = {kind: s["sha256"] for kind, s in seal.subjects().items()}
    names = {"model": context.model_name, "corpus": context.corpus_name}
    chosen = loaded.digests if loaded else {k: (f"name:{names[k]}" if names[k] else pinned[k]) for k in pinned}
    return {
        "claim": claim["id"], "statement": claim["statement"], "status": claim["status"],
        "passed": bool(result.passed), "verdict": result.verdict, "headline": result.headline,
        "values": result.values, "cases": result.cases, "data": result.data,
        "checks": sorted(set(result.checks)) or [claim["id"]],
        "profile": "quick" if context.quick else "full", "subjects": chosen,
        "names": names, "depends": depends, "device": device_name(context.device), "versions": versions(),
        "seed": context.seed, "seconds": round(time.perf_counter() - started, 2),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m selfcheck " + " ".join(sys.argv[1:]),
    }  # fmt: skip


def destination(context: Context, only: tuple[str, ...], root: Path = ROOT) -> Path:
    """Where the evidence goes: only a full run on the pinned subjects and the CPU reaches the paper's file."""
    if context.quick:
        return root / "selfcheck/local/quick.json"
    if context.model_name or context.corpus_name or context.device != "cpu":
        key = json.dumps([context.model_name, context.corpus_name, context.device])
        return root / f"selfcheck/local/run-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return root / evidence.DEFAULT


def gpu_destination(context: Context, root: Path = ROOT) -> Path | None:
    """Where GPU claims go: the committed file, if this is a full run on the pinned subjects and a GPU."""
    special = context.quick or context.model_name or context.corpus_name or context.device == "cpu"
    return None if special else root / evidence.GPU


def merge(path: Path, fresh: list[dict[str, Any]], order: list[str]) -> list[dict[str, Any]]:
    """Fresh records over those already in ``path``, in the order of checks.toml."""
    try:
        known = evidence.load(path)
    except SelfcheckError:
        known = {}
    known.update({record["claim"]: record for record in fresh})
    return [known[claim] for claim in order if claim in known]
