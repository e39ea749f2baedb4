"""What nothing here can catch: each row must pass, or the table would say too little."""

from __future__ import annotations

import importlib.util
import marshal
import os
import shutil
from pathlib import Path

from . import acts, packing, proving, records
from .bench import COMMANDS, PASSES, Edit, command, rewrite

BEYOND = "cannot be caught"
PROOF = "Axiom more : forall x y : R, x = y.\n"


def _raised(tree: Path) -> None:
    """Every speed twice as high, in a record that is otherwise as it was."""

    def doubled(record):  # type: ignore[no-untyped-def]
        values = {n: {**v, "value": v["value"] * 2} if v["unit"] == "x" else v for n, v in record["values"].items()}
        return {**record, "values": values}

    rewrite(tree, records.GPU, lambda rs: [doubled(r) for r in rs])
    records.changed("certified-speed", records.GPU, headline="twice as fast as it was")(tree)


def redrawn(tree: Path) -> tuple[int, str]:
    """python -m figures, python -m paper"""
    said = ""
    for words in (COMMANDS["figures"], COMMANDS["paper"]):
        code, more = command(tree, words)
        said += more
        if code:
            return code, said
    return 0, said


def _blind(tree: Path) -> None:
    """The code that looks, edited so that it does not, without sealing it."""
    acts.replaced(
        "selfcheck/isolated.py",
        "    found = []\n    for name, digest in locked",
        "    return []\n    for name, digest in locked",
    )(tree)
    acts.replaced("selfcheck/isolated.py", "        if self.locked is not None and name", "        if False and name")(
        tree
    )
    acts.replaced("selfcheck/harness/seal.py", "    found = differences(root)\n", "    found = []\n")(tree)
    acts.replaced("paper/paper.tex", r"\end{document}", "We also prove P=NP.\n" + r"\end{document}")(tree)


def _first_stage(tree: Path) -> None:
    """Byte code of isolated.py that isolates nothing and says what its owner likes."""
    path = tree / importlib.util.cache_from_source("selfcheck/isolated.py")
    path.parent.mkdir(exist_ok=True)
    text = "import sys\ndef enter(program):\n    print('42 fresh')\n    sys.exit()\n"
    code = marshal.dumps(compile(text, "selfcheck/isolated.py", "exec"))
    path.write_bytes(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + code)


def _answers(tree: Path) -> dict[str, str]:
    """An interpreter that says what its owner likes, whatever it is asked to run."""
    text = "import os\nprint('built paper/paper.pdf', flush=True)\nos._exit(0)\n"
    return acts.around("PYTHONPATH", "sitecustomize.py", text)(tree) or {}


def _fake_coq(tree: Path) -> None:
    """A coqc of the same version that compiles another file than it is given."""
    folder = acts.beside(tree) / "coq"
    folder.mkdir()
    shutil.copy(tree / proving.SOURCE, folder / "True.v")
    real = shutil.which("coqc")
    text = f'#!/bin/sh\nfor last; do :; done\n[ "$last" = QueryAxis.v ] && cp "{folder}/True.v" QueryAxis.v\nexec "{real}" "$@"\n'
    (folder / "coqc").write_text(text, "utf-8")
    (folder / "coqc").chmod(0o755)
    os.symlink(shutil.which("coqchk") or "", folder / "coqchk")
    acts.replaced(proving.SOURCE, proving.HEAD, PROOF + proving.HEAD)(tree)


def _signer(tree: Path) -> tuple[int, str]:
    """unpacking it, and `archive check` before any of its code runs"""
    _raised(tree)
    packing.commit(tree)
    made = packing.members(tree)
    assert made["selfcheck/evidence/gpu.json"] != packing.of_base(tree)["selfcheck/evidence/gpu.json"]
    return packing.checked(lambda files: made)(tree)


EDITS = [
    Edit(BEYOND, "a GPU number raised, the chain computed anew, figures and paper redrawn", _raised, redrawn, PASSES,
         "nobody here measures it: somebody with the card has to, and can attest"),
    Edit(BEYOND, "a kernel changed and sealed, its evidence carried over by hand",
         acts.resealed(acts.appended("src/qaxis/decode/cuda.py", "\nchanged = 1\n")), redrawn, PASSES,
         "digests say what was measured only if whoever wrote them was honest: the claim has to be measured again"),
    Edit(BEYOND, "the code that verifies, edited so that it does not", _blind, "paper", PASSES,
         "a tree cannot vouch for itself: verify with a copy of another origin, or check the signed archive"),
    Edit(BEYOND, "byte code of isolated.py, under `python -m`", _first_stage, "status", PASSES,
         "Python itself reads it before anything of this project runs; the commands of nox start isolated.py as a file, "
         "of which no byte code is read"),
    Edit(BEYOND, "an interpreter that answers in the program's place", _answers, "status", PASSES,
         "what runs the check belongs to the machine; another machine, or nox's fresh environments, would not agree"),
    Edit(BEYOND, "a coqc of the same version that compiles another file", _fake_coq, proving.examine, PASSES,
         "its SHA-256 stands in the record, to be compared with one's own"),
    Edit(BEYOND, "an archive of raised numbers, committed and packed by its author", acts.nothing, _signer, PASSES,
         "a signature says who vouches, not that it is true"),
]  # fmt: skip
