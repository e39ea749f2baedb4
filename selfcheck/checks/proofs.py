"""The real-arithmetic theorems as proofs that the Coq proof assistant accepts.

What is proven is pinned in statements.toml: of every object of the file its type, of a definition what it stands for,
and the axioms that it rests on. Coq's answers are compared with it word for word, white space apart.
``python -m selfcheck.checks.proofs`` writes the pinned file anew, for a change that is meant.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tomlkit

from ..harness.claim import Context, Result, value
from ..harness.files import ROOT, write_atomic
from . import coq as asking

SOURCE = ROOT / "paper/proofs/QueryAxis.v"
PINNED = ROOT / "paper/proofs/statements.toml"
#: the versions of Coq that the pinned text was compared with
TRIED = ("8.16.1",)
HEAD = """What QueryAxis.v proves, as Coq prints it without notations, and the axioms in use. Compared word for word;
made by `python -m selfcheck.checks.proofs`: look at every change, this is what the paper may say."""
#: decides ``before`` by what its type says; the term itself is what tactics made
UNPRINTED = ("before_dec",)


def coq(context: Context) -> Result:
    """Compile the proofs from scratch; ask Coq what they are and what they rest on; have coqchk check them.

    A quick run asks for the axioms of all statements together and takes Coq's own libraries as they are; a full one
    asks for those of each and has coqchk check the libraries too (a minute and a half).
    """
    found = asking.programs()
    pinned = tomlkit.parse(PINNED.read_text("utf-8")).unwrap()
    version, said = "?", None
    try:
        version = found.version()
        said, verdict = examined(SOURCE, pinned, found, alone=context.quick)
    except asking.RefusedError as error:
        verdict = str(error)
    stated = sorted(said.kinds) if said else []
    axioms = sorted(said.axioms) if said else []
    return Result(
        passed=verdict == "accepted",
        verdict=verdict,
        headline=f"{len(stated)} statements accepted by Coq {version}" if verdict == "accepted" else "not accepted",
        values={
            "statements": value(len(stated), "statements", n=len(stated)),
            "axioms": value(len(axioms), "axioms of Coq's library"),
        },
        cases=len(stated),
        data={
            "coq": version, "programs": found.identity(), "axioms": axioms, "tried": list(TRIED),
            "libraries_checked": not context.quick,
        },
        checks=stated,
    )  # fmt: skip


def examined(
    source: Path, pinned: dict[str, Any], found: asking.Programs, *, alone: bool, libraries: str = asking.LIBRARIES
) -> tuple[asking.Said, str]:
    """Coq's answers on ``source``, and "accepted" or how they differ from what is pinned.

    Raises:
        RefusedError: if Coq, or coqchk, does not accept it or is not understood.
    """
    with tempfile.TemporaryDirectory(prefix="qaxis-coq-") as folder:
        made = asking.compiled(source, found, Path(folder))
        said = asking.said_of(made, list(pinned["objects"]), found, each=not alone, libraries=libraries)
        wrong = differences(said, pinned)
        if not wrong:
            listed = asking.checked(made, found, alone=alone)
            wrong = rests_elsewhere(listed, pinned["axioms"], source.stem, alone=alone)
    return said, "; ".join(wrong)[:500] or "accepted"


def rests_elsewhere(listed: set[str], axioms: dict[str, str], module: str, *, alone: bool) -> list[str]:
    """In words, what of the axioms that coqchk names is not pinned; of a file checked alone, only its own count."""
    own = sorted(name for name in listed if name.split(".")[0] == module)
    if own:
        return [f"coqchk says that it rests on {', '.join(own)}"]
    if not alone and {short(name) for name in listed} != axioms.keys():
        return [f"coqchk says that it rests on {', '.join(sorted(listed)) or 'no axiom'}"]
    return []


def short(name: str) -> str:
    """An axiom by its file and name, as ``Print Assumptions`` has it."""
    return ".".join(name.split(".")[-2:])


def differences(said: asking.Said, pinned: dict[str, Any]) -> list[str]:
    """In words, what Coq says otherwise than the pinned text."""
    there = described(said)
    wrong = []
    for name, fields in there["objects"].items():
        was = pinned["objects"][name]
        # Without them nobody was asked; the axioms of all are compared below.
        left_out = set() if said.rests_on else {"axioms"}
        for what in sorted(fields.keys() | was.keys() - left_out):
            if fields.get(what) != was.get(what):
                wrong.append(f"{name}: its {what} is {fields.get(what)}, pinned is {was.get(what)}")
    for name in sorted(there["axioms"].keys() | pinned["axioms"].keys()):
        if there["axioms"].get(name) != pinned["axioms"].get(name):
            wrong.append(f"axiom {name}: {there['axioms'].get(name)}, pinned is {pinned['axioms'].get(name)}")
    return wrong


def described(said: asking.Said) -> dict[str, Any]:
    """Coq's answers in the form of the pinned file."""
    objects: dict[str, Any] = {}
    for name in sorted(said.types):
        objects[name] = {"kind": said.kinds.get(name, "Definition"), "type": said.types[name]}
        if name in said.bodies and name not in UNPRINTED:
            objects[name]["is"] = said.bodies[name]
        if name in said.rests_on:
            objects[name]["axioms"] = said.rests_on[name]
    return {"axioms": dict(sorted(said.axioms.items())), "objects": objects}


def pin(source: Path = SOURCE, target: Path = PINNED, libraries: str = asking.LIBRARIES) -> dict[str, Any]:
    """Write the pinned file over what Coq says now."""
    found = asking.programs()
    with tempfile.TemporaryDirectory(prefix="qaxis-coq-") as folder:
        made = asking.compiled(source, found, Path(folder))
        said = asking.said_of(made, asking.objects(made, found, libraries), found, each=True, libraries=libraries)
    document = tomlkit.document()
    for line in HEAD.splitlines():
        document.add(tomlkit.comment(line))
    pinned = described(said)
    document.update(pinned)
    write_atomic(target, tomlkit.dumps(document).encode())
    return pinned


if __name__ == "__main__":
    pin()
