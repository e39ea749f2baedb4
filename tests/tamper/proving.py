"""The proofs: whatever makes them prove less than is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tomlkit

from . import acts
from .bench import NO_EFFECT, Edit

COQ, SOURCE = "proofs", "paper/proofs/QueryAxis.v"
TOP = "Proof. intros. apply same_order_top. now apply query_axis_order. Qed."
HEAD = "(* ---- Theorem 1 ---"
COROLLARY = "Corollary query_axis_top : forall dim q keys n k, nonzero dim q ->\n"


def available() -> bool:
    return shutil.which("coqc") is not None and shutil.which("coqchk") is not None


@contextmanager
def path_with(folder: Path) -> Iterator[None]:
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def examine(tree: Path) -> tuple[int, str]:
    """the check of the claim `proofs` on this file"""
    from selfcheck.checks import coq, proofs

    pinned = tomlkit.parse((tree / "paper/proofs/statements.toml").read_text("utf-8")).unwrap()
    beside = tree.parent / f"{tree.name}-beside/coq"
    found = coq.Programs(*(beside / name for name in ("coqc", "coqchk"))) if beside.is_dir() else coq.programs()
    try:
        verdict = proofs.examined(tree / SOURCE, pinned, found, alone=True)[1]
    except coq.RefusedError as error:
        verdict = str(error)
    return int(verdict != "accepted"), verdict


def attack(name: str, old: str, new: str, said: str) -> Edit:
    return Edit(COQ, name, acts.replaced(SOURCE, old, new), examine, said)


EDITS = [
    attack("a proof admitted", TOP, "Admitted.", "assumed, not proven: query_axis_top"),
    attack("an axiom beside", HEAD, f"Axiom more : forall x y : R, x = y.\n{HEAD}", "assumed, not proven: more"),
    attack("a parameter beside", HEAD, f"Parameter more : nat.\n{HEAD}", "assumed, not proven: more"),
    attack("a theorem in a comment", COROLLARY, f"(* {COROLLARY}", "query_axis_top is pinned and not|coqc says"),
    attack(
        "a theorem in a comment, well", f"Theorem bias_breaks_order{(B := ' : exists (s bias : scores), ~ same_order s')}",
        f"(* *)\nLemma bias_breaks{B}", "bias_breaks is not pinned",
    ),
    attack(
        "guard checking off", TOP,
        "Proof. exact (fix f dim q keys n k (h : nonzero dim q) (i : nat) {struct i} := f dim q keys n k h i). Qed.",
        "coqc says|assumed to be guarded",
    ),
    attack(
        "guard checking off, and it compiles", COROLLARY, f"Unset Guard Checking.\nFixpoint no (n : nat) : False := no n.\n{COROLLARY}",
        "no is not pinned",
    ),
    attack("positivity checking off", HEAD, f"Unset Positivity Checking.\nInductive bad := B : (bad -> False) -> bad.\n{HEAD}",
           "not pinned"),
    attack("type in type", HEAD, f"Unset Universe Checking.\nDefinition t : Type := (Type : Type).\n{HEAD}", "t is not pinned"),
    attack(
        "a needed theorem restated as True", "Theorem increasing_keeps_order : forall (f : R -> R) s n,\n"
        "  (forall x y, x < y -> f x < f y) -> same_order s (fun i => f (s i)) n.",
        "Lemma increasing : forall (f : R -> R) s n,\n"
        "  (forall x y, x < y -> f x < f y) -> same_order s (fun i => f (s i)) n.", "not in the file|coqc says",
    ),
    attack("a hypothesis added", "Theorem query_axis_order : forall dim q keys n, nonzero dim q ->",
           "Theorem query_axis_order : forall dim q keys n, nonzero dim q -> 0 < 1 ->", "coqc says|its type is"),
    attack("ties of scores only", "(s i = s j /\\ (i < j)%nat)", "(s i = s j /\\ (i <= j)%nat)", "coqc says|its is is"),
    attack("a definition shadowed", HEAD, f"Definition sqrt (x : R) := x.\n{HEAD}", "sqrt is not pinned"),
    attack("a definition that proves more", "Definition norm (a : vector) : R := sqrt (dot a a).",
           "Definition norm (a : vector) : R := sqrt (dot a a + 0).", "norm: its is is|coqc says"),
    attack("a notation in the way", "Theorem query_axis_comparison", 'Local Notation "x <= y" := (x = x /\\ y = y).\n'
           "Theorem query_axis_comparison", "coqc says|its type is"),
    attack("comments and layout", HEAD, f"(* Axiom more : False. *)\n\n{HEAD}", NO_EFFECT),
    Edit(COQ, "a pinned type changed", acts.replaced("paper/proofs/statements.toml", "iff (", "and ("), examine, "its type is"),
    Edit(COQ, "a pinned statement removed", acts.replaced("paper/proofs/statements.toml", "[objects.two]", "[objects.three]"),
         examine, "two is not pinned"),
]  # fmt: skip
