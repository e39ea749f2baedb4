"""Python processes that a check starts, so that what they depend on counts as the check's."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import isolated
from . import tracing
from .files import ROOT


def run(code: str, *arguments: str, under: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code arguments``, isolated, in the repository's root, its output captured.

    Args:
        under: a program that the child runs under, with its options.
        options: of ``subprocess.run``; ``env`` is added to this process's.

    Raises:
        RuntimeError: if it ends well and does not say what it depends on.
    """
    with tempfile.TemporaryDirectory(prefix="qaxis-trace-") as folder:
        report = Path(folder) / "report.json"
        env = {**isolated.environment(), **options.pop("env", {}), tracing.REPORT: str(report)}
        done = subprocess.run(
            [*under, *isolated.command("selfcheck.harness.traced"), "-c", code, *arguments],
            cwd=ROOT, env=env, capture_output=True, text=True, **options,
        )  # fmt: skip
        if report.is_file():
            said = json.loads(report.read_text("utf-8"))
            tracing.RAN.update(said["ran"])
            for name, found in said["imported"].items():
                tracing.IMPORTED[name] = tracing.IMPORTED.get(name, frozenset()) | frozenset(found)
        elif done.returncode == 0:
            raise RuntimeError("a child process ended well but did not say what it depends on")
    return done
