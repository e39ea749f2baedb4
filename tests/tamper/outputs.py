"""What was made from evidence, or says it again."""

from __future__ import annotations

import json
from pathlib import Path

from . import acts
from .bench import NO_EFFECT, Edit

TEX = "paper/paper.tex"
OUTPUT, SUPPLY = "outputs", "supply chain"


def _ledger(tree: Path) -> None:
    path = tree / "figures/figures.json"
    document = json.loads(path.read_text("utf-8"))
    document["entropy"]["files"]["png"] = "0" * 64
    path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")


def _bound() -> list[Edit]:
    rows = []
    for name in ("figures/entropy.pdf", "figures/entropy.png", "figures/figures.json", "paper/numbers.tex",
                 "paper/paper.pdf", "README.md", "CITATION.cff", "LICENSE-CODE.txt", "LICENSE-TEXT-DATA.txt",
                 "examples/reviewer.py", "codemeta.json", ".zenodo.json", "archive/allowed_signers"):  # fmt: skip
        rows.append(Edit(OUTPUT, f"{name} edited", acts.appended(name, " "), "verify", name))
    for name in ("figures/memory.pdf", "paper/paper.pdf", "paper/numbers.tex", "README.md", "archive/manifest.json"):
        rows.append(Edit(OUTPUT, f"{name} missing", acts.removed(name), "verify", name))
    return [
        *rows,
        Edit(
            OUTPUT,
            "a number of README's table",
            acts.replaced("README.md", ".1f-->1.6<!--/-->", ".1f-->6.1<!--/-->"),
            "verify",
            "README",
        ),
        Edit(OUTPUT, "manifest without its outputs", acts.written("archive/manifest.json", "{}"), "verify", "manifest"),
        Edit(OUTPUT, "manifest edited", acts.flipped("archive/manifest.json", -40), "verify", "its own digest"),
    ]


def _read_again() -> list[Edit]:
    return [
        Edit(OUTPUT, "a figure edited", acts.appended("figures/entropy.pdf", " "), "paper", "not the file that was drawn"),
        Edit(OUTPUT, "a figure in another's place", _another, "paper", "not the file that was drawn"),
        Edit(OUTPUT, "a figure missing", acts.removed("figures/memory.pdf"), "paper", "figures/memory.pdf: missing"),
        Edit(OUTPUT, "the figures' ledger emptied", acts.written("figures/figures.json", "{}"), "paper", "not in figures"),
        Edit(OUTPUT, "the figures' ledger unreadable", acts.written("figures/figures.json", "["), "paper", "unreadable"),
        Edit(OUTPUT, "the figures' ledger a list", acts.written("figures/figures.json", "[]"), "paper", "figures.json"),
        Edit(OUTPUT, "another figure's PNG", _another_png, "paper", "entropy.png: not the file that was drawn"),
        Edit(OUTPUT, "a figure that nobody drew", acts.written("figures/more.png", b"x"), "paper", "more: not in figures"),
        Edit(OUTPUT, "text sealed, bound without a new PDF", acts.resealed(acts.appended(TEX, "% x")), "bind", f"other files: {TEX}"),
        Edit(OUTPUT, "paper.pdf edited, then bound", acts.appended("paper/paper.pdf", " "), "bind", "other files: paper/paper.pdf"),
        Edit(OUTPUT, "a figure edited, then bound", acts.appended("figures/entropy.png", " "), "bind", "not the file that was drawn"),
        Edit(OUTPUT, "a licence missing, then bound", acts.removed("LICENSE-CODE.txt"), "bind", "LICENSE-CODE.txt: missing"),
        Edit(OUTPUT, "a mark of README mistyped", acts.replaced("README.md", "<!--qx claims.gpu", "<!--qx  claims.gpu"), "bind", "marks begin"),
        Edit(OUTPUT, "a mark of README without its end", acts.replaced("README.md", "<!--/-->", ""), "bind", "marks begin"),
        Edit(OUTPUT, "README no UTF-8", acts.appended("README.md", b"\xff"), "bind", "README.md: unreadable"),
        Edit(OUTPUT, "another party's evidence unreadable", acts.written("selfcheck/evidence/attested/x.json", "x"), "verify", "attested/x.json"),
        Edit(OUTPUT, "numbers.tex edited, then paper", acts.appended("paper/numbers.tex", r"\typeout{x}"), "paper", NO_EFFECT),
        Edit(OUTPUT, "paper.pdf edited, then paper", acts.appended("paper/paper.pdf", " "), "paper", NO_EFFECT),
        Edit(OUTPUT, "figures edited, then figures", acts.appended("figures/entropy.pdf", " "), "figures", NO_EFFECT),
        Edit(OUTPUT, "the ledger edited, then figures", _ledger, "figures", NO_EFFECT),
    ]  # fmt: skip


def _another_png(tree: Path) -> None:
    (tree / "figures/entropy.png").write_bytes((tree / "figures/stages.png").read_bytes())


def _another(tree: Path) -> None:
    (tree / "figures/entropy.pdf").write_bytes((tree / "figures/memory.pdf").read_bytes())


def _supply() -> list[Edit]:
    rows = []
    for name in ("selfcheck", "figures", "tex", "subjects", "torch"):
        file = f"requirements/{name}.txt"
        rows.append(Edit(SUPPLY, f"a hash of {file}", acts.replaced(file, "sha256:", "sha256:0"), "paper", file))
    for name in ("selfcheck", "archive"):
        file = f"requirements/{name}.txt"
        rows.append(Edit(SUPPLY, f"a version of {file}", acts.replaced(file, "==", "==9"), "status", file))
    pin = acts.replaced("noxfile.py", "--require-hashes", "--no-deps")
    for name in ("setup.py", "setup.cfg", "conftest.py"):
        rows.append(Edit(SUPPLY, f"{name} in the root", acts.written(name), "paper", f"{name}: not sealed"))
    return [*rows, Edit(SUPPLY, "nox installs without hashes", pin, "paper", "noxfile.py: locked as")]


EDITS = [*_bound(), *_read_again(), *_supply()]
