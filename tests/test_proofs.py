"""What Coq says of the proofs is what is pinned; whatever would make it say less is refused."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
import tomlkit

from selfcheck.checks import coq, proofs
from selfcheck.harness.claim import Context, NotRunError

needs_coq = pytest.mark.skipif(
    shutil.which("coqc") is None or shutil.which("coqchk") is None, reason="coqc and coqchk are not on the PATH"
)

#: a small file in the form of the real one, so that a test takes a second
SMALL = """Require Import Classical_Prop.
Definition twice (n : nat) : nat := n + n.
Fixpoint sum (n : nat) : nat := match n with O => O | S m => sum m + n end.
Theorem twice_even : forall n, exists m, twice n = m + m.
Proof. intros n. exists n. reflexivity. Qed.
Lemma decided : forall P : Prop, ~ ~ P -> P.
Proof. intros P H. destruct (classic P); tauto. Qed.
"""
THEOREM = SMALL[SMALL.index("Theorem") : SMALL.index("Lemma")]
PROOF = "Proof. intros n. exists n. reflexivity. Qed."
#: the same of a function that is always 0
EASY = THEOREM.replace("exists n.", "exists 0.")
LIBRARIES = ""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The small file, and what is pinned of it."""
    source = tmp_path_factory.mktemp("small") / "Small.v"
    source.write_text(SMALL, "utf-8")
    pinned = proofs.pin(source, source.with_suffix(".toml"), LIBRARIES)
    assert pinned == tomlkit.parse(source.with_suffix(".toml").read_text("utf-8")).unwrap()
    return source, pinned


def verdict(source: Path, pinned: dict, text: str, folder: Path) -> str:
    copy = folder / source.name
    copy.write_text(text, "utf-8")
    try:
        return proofs.examined(copy, pinned, coq.programs(), alone=True, libraries=LIBRARIES)[1]
    except coq.RefusedError as error:
        return str(error)


@needs_coq
def test_the_small_file_is_accepted_and_pinned_as_it_is(small, tmp_path):
    source, pinned = small
    assert list(pinned["objects"]) == ["decided", "sum", "twice", "twice_even"]
    assert pinned["objects"]["decided"]["axioms"] == ["Classical_Prop.classic"] == list(pinned["axioms"])
    assert pinned["objects"]["twice_even"]["axioms"] == [] and "is" not in pinned["objects"]["twice_even"]
    assert pinned["objects"]["twice"]["is"] == "fun n : nat => Nat.add n n"
    assert verdict(source, pinned, SMALL, tmp_path) == "accepted"
    # Neither comments and layout, nor what a file prints or writes beside itself, bear on it.
    text = "(* *)\n" + SMALL.replace("exists n. ", "exists n.\n\n") + 'Print twice.\nRedirect "all" Print nat.\n'
    assert verdict(source, pinned, text, tmp_path) == "accepted"


ATTACKS = {
    "admitted": (PROOF, "Admitted.", "assumed, not proven: twice_even"),
    "own axiom": (THEOREM, f"Axiom other : True.\n{THEOREM}", "assumed, not proven: other"),
    "own parameter": (THEOREM, f"Parameter other : nat.\n{THEOREM}", "assumed, not proven: other"),
    "hypothesis": (THEOREM, f"Hypothesis other : False.\n{THEOREM}", "assumed, not proven: other"),
    "hidden axiom": (THEOREM, f"Axiom a_subproof : False.\n{THEOREM}", "assumed, not proven: a_subproof"),
    "in a comment": (THEOREM, f"(*\n{THEOREM}*)\n", "twice_even is pinned and not in the file"),
    "one more": (THEOREM, f"{THEOREM}Lemma more : True. Proof. exact I. Qed.\n", "more is not pinned"),
    "no guard": (
        PROOF, "Proof. exact (fix f (n : nat) : exists m, twice n = m + m := f n). Qed.\nSet Guard Checking.",
        "is assumed to be guarded",
    ),
    "no positivity": (
        THEOREM, f"Unset Positivity Checking.\nInductive bad : Prop := B : (bad -> False) -> bad.\n{THEOREM}",
        "bad is not pinned",
    ),
    "no universes": (
        PROOF, "Proof. pose (t := Type : (Type : Type)). intros n. exists n. reflexivity. Qed.", "relies on an unsafe",
    ),
    "restated as True": (THEOREM, "Theorem twice_even : True. Proof. exact I. Qed.\n", "its type is True, pinned is"),
    "weaker": ("forall n, exists m, twice n", "forall n, n = n -> exists m, twice n", "twice_even: its type is"),
    "other definition": ("n + n.", "let m := n in m + n.", "twice: its is is fun n : nat => let m"),
    "shadowed": (THEOREM, f"Definition ex (A : Type) (P : A -> Prop) := True.\n{THEOREM}", "ex is not pinned"),
    "shadowed in a module": (
        THEOREM, f"Module M. Definition twice (n : nat) := 0. End M. Import M.\n{EASY}", "M.twice is not pinned",
    ),
    "shadowed in a section": (
        THEOREM, f"Section S. Let twice (n : nat) := 0.\n{EASY}End S.\n", "its type is",
    ),
    "notation": (THEOREM, f'Local Notation "x = y" := (x <= y).\n{THEOREM}', "twice_even: its type is"),
    "an axiom of a library": (
        PROOF, "Proof. intros n. pose (JMeq.JMeq_eq (x := n)). exists n. reflexivity. Qed.", "axiom",
    ),
    "lemma as theorem": ("Lemma", "Theorem", "decided: its kind is Theorem, pinned is Lemma"),
    "a wrong proof": ("exists n.", "exists 0.", "coqc says: "),
    "a question in the way": (THEOREM, f"{THEOREM}Module Small. End Small.\n", "not understood"),
}  # fmt: skip
BEFORE = {"no guard": "Unset Guard Checking.\n", "no universes": "Unset Universe Checking.\n",
          "an axiom of a library": "Require JMeq.\n"}  # fmt: skip


@needs_coq
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_the_proofs_is_refused(small, tmp_path, attack):
    old, new, said = ATTACKS[attack]
    assert SMALL.count(old) == 1
    assert said in verdict(*small, SMALL.replace(old, BEFORE.get(attack, "") + new), tmp_path)


@needs_coq
def test_the_checker_alone_finds_what_is_unsafe(tmp_path):
    old, new, _ = ATTACKS["no guard"]
    (copy := tmp_path / "Small.v").write_text(SMALL.replace(old, BEFORE["no guard"] + new), "utf-8")
    made = coq.compiled(copy, coq.programs(), tmp_path)
    with pytest.raises(coq.RefusedError, match=r"unsafe \(co\)fixpoints: Small.twice_even"):
        coq.checked(made, coq.programs(), alone=True)


@needs_coq
def test_the_paper_s_proofs_are_accepted():
    result = proofs.coq(Context(quick=True))
    assert result.passed, result.verdict
    assert result.values["statements"]["value"] == 24 == len(result.checks)
    assert result.values["axioms"]["value"] == 4 and "Classical_Prop.classic" in result.data["axioms"]
    assert [program["file"] for program in result.data["programs"]] == ["coqc", "coqchk"]
    assert all(len(program["sha256"]) == 64 for program in result.data["programs"])


def test_answers_that_are_not_understood_are_refused():
    assert coq.axioms("Closed under the global context\n", "x") == {}
    assert coq.axioms("Axioms:\na.b : forall x,\n  x\nc\n  : True\n", "x") == {"a.b": "forall x, x", "c": "True"}
    for text in (
        "",
        "Axioms:",
        "Axioms:\nf is assumed to be guarded.",
        "Axioms:\na : b\nPolymorphic",
        "Opaque:\na : b",
    ):
        with pytest.raises(coq.RefusedError, match="not understood"):
            coq.axioms(text, "x")
    safe = "".join(f"* {title}: <none>\n  \n" for title in coq.SAFE)
    good = (
        f"\nCONTEXT SUMMARY\n===============\n\n* Theory: Set is predicative\n  \n* Axioms:\n    Coq.A.b\n  \n{safe}\n"
    )
    assert coq.summary(good) == {"A.b"}
    for old, new in (
        ("predicative", "impredicative"), ("* Axioms:\n", ""), ("<none>", "Small.f"), ("\n* Th", "!\n* Th"), (safe, ""),
        ("CONTEXT", "WARNING: x\nCONTEXT"), ("    Coq.A.b\n", "    a b\n"),
    ):  # fmt: skip
        assert old in good
        with pytest.raises(coq.RefusedError, match="coqchk says"):
            coq.summary(good.replace(old, new, 1))


def test_the_axioms_that_coqchk_names_are_the_pinned_ones():
    axioms = {"Classical_Prop.classic": "forall P : Prop, or P (not P)"}
    assert proofs.rests_elsewhere({"Logic.Classical_Prop.classic"}, axioms, "Small", alone=False) == []
    assert proofs.rests_elsewhere({"A.b", "Logic.Classical_Prop.classic"}, axioms, "Small", alone=True) == []
    for listed in (set(), {"A.b", "Logic.Classical_Prop.classic"}, {"Small.Classical_Prop.classic"}):
        assert proofs.rests_elsewhere(listed, axioms, "Small", alone=False)
    assert proofs.rests_elsewhere({"Small.Classical_Prop.classic"}, axioms, "Small", alone=True)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    (folder / name).chmod(stat.S_IRWXU)


@pytest.mark.parametrize(
    "says", ["exit 0", "echo 8.16.1 4.13.1", "echo 8.16.1 4.13.1 > $1.vo; echo >&2 warning", "exit 1"]
)
def test_a_program_that_only_has_the_name_is_refused(tmp_path, monkeypatch, says):
    for name in ("coqc", "coqchk"):
        program(tmp_path / "bin", name, says)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    result = proofs.coq(Context(quick=True))
    assert not result.passed and result.values["statements"]["value"] == 0, result.verdict


def test_without_coq_nothing_is_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(NotRunError, match="coqc is not on the PATH"):
        proofs.coq(Context())
    program(tmp_path / "bin", "coqc", "exit 0")
    with pytest.raises(NotRunError, match="coqchk is not on the PATH"):
        proofs.coq(Context())
