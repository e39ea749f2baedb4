"""Versions that evidence was made with, and the lists they must be on: one for CPU records, one for GPU records."""

from __future__ import annotations

import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from .files import ROOT, SelfcheckError

CPU_LIST, GPU_LIST = "constraints.txt", "constraints-gpu.txt"
PACKAGES = ("torch", "transformers", "triton", "hypothesis", "numpy", "scipy", "tokenizers", "gguf")
ABSENT = "absent"


def installed() -> dict[str, str]:
    """Versions here of Python and of what a measurement may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ABSENT
    return found


def machine() -> dict[str, str]:
    """What the lists' markers may ask of this machine, beside Python's version."""
    here = default_environment()
    return {name: here[name] for name in ("sys_platform", "platform_machine", "platform_python_implementation")}  # type: ignore[literal-required]


def outside_here(on_gpu: bool) -> list[str]:
    """What a record made here would have off its list."""
    return outside({"versions": installed(), "machine": machine()}, on_gpu)


def outside(record: dict[str, Any], on_gpu: bool, root: Path = ROOT) -> list[str]:
    """Versions of a record that its list does not have, in words; empty if it has all.

    Builds are not told apart (``2.13.0+cpu`` is ``2.13.0``).
    """
    name = GPU_LIST if on_gpu else CPU_LIST
    found = record.get("versions") or {}
    if not found:
        return [f"no versions, {name} asks for them"]
    listed = _listed(root / name, (root / name).stat().st_mtime_ns)
    python = found.get("python", ABSENT)
    environment = {
        **default_environment(), **record.get("machine", {"sys_platform": "linux", "platform_machine": "x86_64"}),
        "python_version": ".".join(python.split(".")[:2]), "python_full_version": python, "extra": "",
    }  # fmt: skip
    wrong = []
    for package in (x for x in PACKAGES if x in found or x in listed):
        asked = [r for r in listed.get(package, []) if r.marker is None or r.marker.evaluate(environment)]
        has = found.get(package, ABSENT)
        if has == ABSENT:
            wrong += [f"{package} {ABSENT}, {name} has {r.specifier}" for r in asked]
        elif not asked:
            wrong.append(f"{package} {has}, {name} has none for Python {python}")
        elif not any(_meets(has, r) for r in asked):
            wrong.append(f"{package} {has}, {name} has {' or '.join(str(r.specifier) for r in asked)}")
    return wrong


def _meets(has: str, asked: Requirement) -> bool:
    """Whether a version is one that a requirement has; what is no version is none."""
    try:
        return asked.specifier.contains(has, prereleases=True)
    except InvalidVersion:
        return False


@lru_cache(maxsize=16)
def _listed(path: Path, modified: int) -> dict[str, list[Requirement]]:
    listed: dict[str, list[Requirement]] = {}
    for line in path.read_text("utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line:
            try:
                asked = Requirement(line)
            except ValueError as error:
                raise SelfcheckError(f"{path.name}: {line!r} is not a requirement: {error}") from None
            listed.setdefault(canonicalize_name(asked.name), []).append(asked)
    return listed
