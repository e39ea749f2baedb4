"""The real-arithmetic theorems as proofs that the Coq proof assistant accepts."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..harness.claim import Context, NotRunError, Result, value
from ..harness.files import ROOT

SOURCE = ROOT / "paper/proofs/QueryAxis.v"
#: what Coq's own real numbers rest on; anything else would be an axiom of ours
ALLOWED = {
    "ClassicalDedekindReals.sig_not_dec", "ClassicalDedekindReals.sig_forall_dec",
    "FunctionalExtensionality.functional_extensionality_dep", "Classical_Prop.classic",
}  # fmt: skip
#: statements without which the file would not prove the paper's theorem
NEEDED = (
    "query_axis_comparison", "query_axis_order", "query_axis_top", "query_axis_sorted", "before_total",
    "gap_above_bound_keeps_order", "bias_breaks_order", "key_scale_breaks_order", "negative_scale_breaks_order",
)  # fmt: skip


def coq(context: Context) -> Result:
    """Compile the proofs from scratch; ask Coq which axioms the needed statements use."""
    compiler = shutil.which("coqc")
    if compiler is None:
        raise NotRunError(
            "coqc is not on the PATH; install it (Debian, Ubuntu: apt install coq; macOS: brew install coq)"
        )
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.split("version ")[1].split()[0]
    )
    text = SOURCE.read_text("utf-8")
    stated = re.findall(r"^(?:Theorem|Lemma|Corollary)\s+(\w+)", text, re.MULTILINE)
    questions = "".join(f"\nPrint Assumptions {name}." for name in NEEDED)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / SOURCE.name
        copy.write_text(text + questions, "utf-8")
        done = subprocess.run([compiler, copy.name], cwd=folder, capture_output=True, text=True, timeout=300)
    axioms = set(re.findall(r"^(\w[\w.]*)\s*:", done.stdout, re.MULTILINE)) | set(
        re.findall(r"^(\w[\w.]*)\n\s+:", done.stdout, re.MULTILINE)
    )
    axioms.discard("Axioms")
    foreign = sorted(axioms - ALLOWED)
    if done.returncode:
        verdict = done.stderr.strip()[-300:]
    elif foreign:
        verdict = f"rests on {', '.join(foreign)}"
    else:
        verdict = "accepted"
    values = {
        "statements": value(len(stated), "statements", n=len(stated)),
        "axioms": value(len(axioms), "axioms of Coq's real numbers"),
    }
    headline = f"{len(stated)} statements accepted by Coq {version}" if verdict == "accepted" else "not accepted"
    return Result(
        passed=verdict == "accepted" and bool(axioms),
        verdict=verdict,
        headline=headline,
        values=values,
        cases=len(stated),
        data={"coq": version, "needed": list(NEEDED), "axioms": sorted(axioms)},
        checks=stated,
    )
