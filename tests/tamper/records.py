"""Evidence that no run would have written; its chain computed anew where nothing else is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import SelfcheckError

from . import acts
from .bench import COMMANDS, NO_EFFECT, Edit, command, rewrite

FORGED, FORM, LOST, STALE = "evidence: forged", "evidence: form", "evidence: chain and files", "evidence: stale"
CPU, GPU = evidence.DEFAULT, evidence.GPU
#: a claim of each file
OF_CPU, OF_GPU = "thm1", "prefill-gpu"


def changed(of_claim: str, file: str, /, **fields: Any) -> acts.Act:
    """Fields of a claim's record; a function is applied to what was there, ``...`` removes it."""

    def of(record: dict[str, Any]) -> dict[str, Any]:
        out = dict(record)
        for name, new in fields.items():
            if new is ...:
                del out[name]
            else:
                out[name] = new(out[name]) if callable(new) else new
        return out

    return lambda tree: rewrite(tree, file, lambda rs: [of(r) if r["claim"] == of_claim else r for r in rs])


def gpu(name: str, said: str, /, **fields: Any) -> Edit:
    return Edit(FORGED, name, changed(OF_GPU, GPU, **fields), "paper", f"{OF_GPU}[^\n]*{said}")


def cpu(name: str, said: str, /, **fields: Any) -> Edit:
    return Edit(FORGED, name, changed(OF_CPU, CPU, **fields), "paper", f"{OF_CPU}[^\n]*{said}")


def _first_value(**new: Any) -> Callable[[Any], Any]:
    return lambda values: {**values, (name := next(iter(values))): {**values[name], **new}}


def _forged() -> list[Edit]:
    other = "0" * 64
    return [
        gpu("GPU claim measured on a CPU", "measured on", device="Linux x86_64 CPU"),
        gpu("GPU claim measured on a device nobody makes", "measured on", device="QPU 1"),
        gpu("device that TeX obeys", "device|measured on", device=r"NVIDIA \input{/etc/hostname}"),
        gpu("torch 1.0", "torch 1.0", versions=lambda v: {**v, "torch": "1.0"}),
        gpu("Python 2.7", "Python 2.7", versions=lambda v: {**v, "python": "2.7"}),
        gpu("no torch", "torch", versions=lambda v: {n: x for n, x in v.items() if n != "torch"}),
        gpu("measured in 2099", "2099", time="2099-01-01T00:00:00+00:00"),
        gpu("measured in 2102", "2102|time", time="2102-01-01T00:00:00+00:00"),
        gpu("measured in 1999", "1999|time", time="1999-01-01T00:00:00+00:00"),
        gpu("measured before the project", "2020", time="2020-01-01T00:00:00+00:00"),
        gpu("a day that no month has", "02-31|time", time="2026-02-31T00:00:00+00:00"),
        gpu("seed of choice", "seed", seed=1),
        gpu("command of choice", "command", command="vi gpu.json"),
        gpu("quick run", "quick", profile="quick"),
        gpu("failed", "failed", passed=False),
        gpu("other subjects", "subjects", subjects={"model": other, "corpus": other}),
        gpu("other model by name", "subjects by name", names={"model": "gpt2", "corpus": None}),
        gpu("measured by another check", "measured by", check="theorem:ranking"),
        gpu("no dependencies", "stale|depends", depends={}),
        gpu("a dependency left out", "stale",
            depends=lambda d: {n: x for n, x in d.items() if not n.startswith("selfcheck/checks/")}),
        gpu("a dependency that is gone", "stale", depends=lambda d: {**d, "src/qaxis/gone.py": other}),
        gpu("a dependency outside of the tree", "depends", depends=lambda d: {**d, "../x.py": other}),
        gpu("another statement", "stated", statement="Everything is exact"),
        gpu("another status", "stated|status", status="descriptive"),
        cpu("CPU claim measured on a GPU", "measured on", device="NVIDIA H100 80GB HBM3"),
        cpu("CPU claim with torch 1.0", "torch 1.0", versions=lambda v: {**v, "torch": "1.0"}),
        cpu("CPU claim in 2099", "2099", time="2099-01-01T00:00:00+00:00"),
        cpu("a claim's record in another's place", "there twice", claim="thm1-stops"),
    ]  # fmt: skip


#: {key: what is no value of it}
ILL_TYPED = {
    "cases": -1, "checks": "all", "claim": 7, "command": None, "data": [], "depends": [], "device": 1, "headline": None,
    "names": None, "passed": "false", "profile": "fulll", "seconds": "1", "seed": 1.5, "statement": {}, "status": "proven",
    "subjects": None, "time": "yesterday", "values": [], "verdict": 0, "versions": "new",
}  # fmt: skip


def read(tree: Path) -> tuple[int, str]:
    """reading it, which every command begins with"""
    try:
        for name in (CPU, GPU):
            evidence.read(tree / name, tree)
    except SelfcheckError as error:
        return 1, str(error)
    return 0, "read"


def _form() -> list[Edit]:
    rows = []
    for key, value in ILL_TYPED.items():
        act = changed(OF_GPU, GPU, **{key: value})
        said = "record \\d+" if key == "claim" else key
        rows.append(Edit(FORM, f"{key} is {json.dumps(value)}", act, read, said))
    for key in sorted(ILL_TYPED.keys() - {"claim"}):
        rows.append(Edit(FORM, f"{key} missing", changed(OF_CPU, CPU, **{key: ...}), read, f"'{key}'"))
    rows += [
        Edit(FORM, "a key that is not known", lambda tree: rewrite(tree, GPU, lambda rs: [{**rs[0], "vouched": 1}, *rs[1:]]),
            "paper", "vouched"),
        Edit(FORM, "a value that is text", changed(OF_GPU, GPU, values=_first_value(value="2 times")), "paper", "values"),
        Edit(FORM, "a value without unit", changed(OF_GPU, GPU, values=lambda v: {n: {"value": 1} for n in v}), "paper",
             "required|values"),
        Edit(FORM, "TeX in a row, which is printed and not obeyed", changed("thm1-stops", CPU, data=_injected), printed, NO_EFFECT),
        Edit(FORM, "100,000 padded names", changed(OF_GPU, GPU, data=lambda d: {**d, **{f"x{i}": 0 for i in range(100000)}}),
             "paper", "data"),
        Edit(FORM, "a right-to-left mark in a verdict", changed(OF_GPU, GPU, verdict="a\u202eb"), "paper", "verdict"),
        Edit(FORM, "an escape of the terminal", changed(OF_GPU, GPU, headline="\x1b[2J"), "status", "headline"),
        Edit(FORM, "a check's name twice", changed(OF_CPU, CPU, checks=lambda c: [*c, c[0]]), "paper", "checks"),
    ]  # fmt: skip
    for name, old, new, said in (
        ("format 2", '"format": 1', '"format": 2', "format"),
        ("NaN", '"seed": 20260601', '"seed": NaN', "NaN"),
        ("infinity", '"seed": 20260601', '"seed": 1e999', "larger"),
        ("a key twice", '"seed": 20260601', '"seed": 20260601, "seed": 20260601', "twice"),
        ("nested deeply", '"seed": 20260601', f'"seed": {"[" * 50000}{"]" * 50000}', "nested"),
        ("not JSON", '"format": 1', '"format" 1', "unreadable"),
    ):
        rows.append(Edit(FORM, name, acts.replaced(GPU, old, new), "paper", said))
    rows += [
        Edit(FORM, "not UTF-8", _not_utf8, "paper", "UTF-8"),
        Edit(FORM, "a list", acts.written(GPU, "[]"), "paper", "gpu.json"),
        Edit(FORM, "null", acts.written(CPU, "null"), "figures", "default.json"),
        Edit(FORM, "20 MB", acts.written(GPU, " " * (20 << 20)), "paper", "larger than"),
    ]
    return rows


def printed(tree: Path) -> tuple[int, str]:
    """python -m paper"""
    there = Path(shutil.copytree(tree, acts.beside(tree) / "there"))
    code, said = command(there, COMMANDS["paper"])
    text = (there / "paper/numbers.tex").read_text("utf-8")
    return code or int(r"\input{/etc" in text or "textbackslash" not in text), said


def _injected(data: Any) -> Any:
    """A text of a table's row, wherever it stands, that TeX would obey if it were not escaped."""
    if isinstance(data, dict):
        return {name: _injected(x) for name, x in data.items()}
    if isinstance(data, list):
        return [_injected(x) for x in data]
    return r"\input{/etc/hostname}" if isinstance(data, str) else data


def _not_utf8(tree: Path) -> None:
    with (tree / GPU).open("ab") as stream:
        stream.write(b"\xff")


def _edited(name: str, old: str, new: str) -> acts.Act:
    """A text of the file that is there once or more, the chain left as it was."""

    def act(tree: Path) -> None:
        text = (tree / name).read_text("utf-8")
        made, count = re.subn(old, new, text, count=1)
        assert count == 1, f"{name} has no {old}; update tests/tamper"
        (tree / name).write_text(made, "utf-8")

    return act


def _swapped(tree: Path) -> None:
    (tree / CPU).rename(tree / "x")
    (tree / GPU).rename(tree / CPU)
    (tree / "x").rename(tree / GPU)


def _moved(tree: Path) -> None:
    taken: list[Any] = []

    def out(records: list[Any]) -> list[Any]:
        taken.extend(r for r in records if r["claim"] == OF_CPU)
        return [r for r in records if r["claim"] != OF_CPU]

    rewrite(tree, CPU, out)
    rewrite(tree, GPU, lambda records: [*records, *taken])


def _documents(change: Callable[[dict[str, Any]], None]) -> acts.Act:
    def act(tree: Path) -> None:
        document = json.loads((tree / GPU).read_text("utf-8"))
        change(document)
        (tree / GPU).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")

    return act


def _reordered(document: dict[str, Any]) -> None:
    document["records"].reverse()


def _shortened(document: dict[str, Any]) -> None:
    document["records"].pop()
    document["links"].pop()


def _lost() -> list[Edit]:
    value = r'"value": [0-9.]+'
    rows = [
        Edit(LOST, "a value edited, the chain left", _edited(GPU, value, '"value": 9.0'), c, "hash chain does not hold")
        for c in ("status", "figures", "paper", "verify")
    ]
    for name in (CPU, GPU):
        rows.append(
            Edit(LOST, f"{name} missing", acts.removed(name), "paper", f"{Path(name).name}: no evidence|missing")
        )
        rows.append(Edit(LOST, f"{name} empty", acts.written(name, ""), "paper", "unreadable"))
    rows += [
        Edit(LOST, "a record dropped", lambda t: rewrite(t, GPU, lambda rs: rs[1:]), "paper", "missing"),
        Edit(LOST, "all records dropped", lambda t: rewrite(t, CPU, lambda rs: []), "paper", "missing"),
        Edit(LOST, "a record twice", lambda t: rewrite(t, GPU, lambda rs: [*rs, rs[0]]), "paper", "twice"),
        Edit(LOST, "a claim nobody made", lambda t: rewrite(t, GPU, lambda rs: [*rs, {**rs[0], "claim": "p-np"}]), "paper",
             "no claim 'p-np'"),
        Edit(LOST, "records reordered, the chain left", _documents(_reordered), "paper", "hash chain"),
        Edit(LOST, "the last record cut off", _documents(_shortened), "paper", "hash chain"),
        Edit(LOST, "another root", _documents(lambda d: d.update(root="0" * 64)), "paper", "hash chain"),
        Edit(LOST, "no links", _documents(lambda d: d.update(links=[])), "paper", "links"),
        Edit(LOST, "the two files swapped", _swapped, "paper", "claim of"),
        Edit(LOST, "a record in the other file", _moved, "paper", "claim of|missing"),
        Edit(LOST, "evidence a folder", acts.together(acts.removed(GPU), acts.written(f"{GPU}/x", "")), "paper", "gpu.json"),
        Edit(LOST, "figures of other evidence", _value_of_a_figure, "paper", "other evidence of"),
    ]  # fmt: skip
    return rows


def _value_of_a_figure(tree: Path) -> None:
    """A number of a record, raised: the figures are of the record before."""
    changed("entropy", CPU, headline="better")(tree)


def _code(name: str) -> acts.Act:
    """Code that a record depends on, changed and sealed, its evidence left."""

    def act(tree: Path) -> None:
        acts.appended(name, "\nchanged = 1\n")(tree)
        seal.seal(tree)

    return act


def _another_subject(tree: Path) -> None:
    text = (tree / "selfcheck/inputs/subjects.toml").read_text("utf-8")
    text = re.sub("[0-9a-f]{64}", "0" * 64, text, count=1)
    (tree / "selfcheck/inputs/subjects.toml").write_text(text, "utf-8")
    seal.seal(tree)


def _another_version(tree: Path) -> None:
    text = re.sub(r"(?m)^torch==\S+", "torch==9.9.9", (tree / "constraints.txt").read_text("utf-8"))
    (tree / "constraints.txt").write_text(text, "utf-8")
    seal.seal(tree)


def _stale() -> list[Edit]:
    rows = []
    for name in ("src/qaxis/arithmetic/reference.py", "src/qaxis/decode/cuda.py", "selfcheck/checks/theorem.py",
                 "selfcheck/inputs/witness.py"):  # fmt: skip
        rows.append(Edit(STALE, f"{name} changed and sealed", _code(name), "paper", f"stale, made before[^\n]*{name}"))
    return [
        *rows,
        Edit(STALE, "another model pinned and sealed", _another_subject, "paper", "other subjects"),
        Edit(STALE, "another torch pinned and sealed", _another_version, "paper", "stale, made with torch"),
        Edit(
            STALE,
            "a figure's code changed and sealed",
            _code("figures/entropy.py"),
            "paper",
            "before figures/entropy.py",
        ),
    ]


EDITS = [*_forged(), *_form(), *_lost(), *_stale()]
