"""Metadata before the tools that read it: cffconvert, rocrate-validator, the schemas of Zenodo and CodeMeta."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from selfcheck.harness.files import ROOT, SelfcheckError

from .tree import CRATE, CRATE_VERSION

SCHEMAS = {".zenodo.json": "archive/schemas/zenodo.json", "codemeta.json": "archive/schemas/codemeta.json"}


def run(folder: Path) -> list[str]:
    """What each validator says of the metadata of an unpacked archive.

    Raises:
        SelfcheckError: with what those that refuse it say, or naming one that is not installed.
    """
    said, refused = [], []
    for name in SCHEMAS:
        wrong = against_schema(name, _read(folder, name))
        refused += wrong
        if not wrong:
            said.append(f"{name}: valid against {SCHEMAS[name]}")
    with tempfile.TemporaryDirectory(prefix="qaxis-validate-") as cache:
        _keep_context(Path(cache) / "http")
        commands = {
            "CITATION.cff": [_program("cffconvert"), "--validate", "-i", str(folder / "CITATION.cff")],
            CRATE: [
                _program("rocrate-validator"), "-y", "validate", "--offline", "--cache-path", f"{cache}/http",
                "-p", f"ro-crate-{CRATE_VERSION}", "-l", "required", "-v", "--no-paging", str(folder),
            ],
        }  # fmt: skip
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
            if done.returncode:
                refused.append(f"{name}: {Path(command[0]).name} refuses it:\n{(done.stdout + done.stderr)[-4000:]}")
            else:
                said.append(f"{name}: valid, says {Path(command[0]).name}")
    if refused:
        raise SelfcheckError("metadata that its readers refuse:\n" + "\n".join(refused))
    return said


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise SelfcheckError(
            f"{folder}: not an unpacked archive: {name} cannot be read ({error.strerror})"
        ) from error  # fmt: skip


def against_schema(name: str, data: bytes) -> list[str]:
    """In words, where one of our JSON files leaves its schema."""
    import jsonschema

    schema = json.loads((ROOT / SCHEMAS[name]).read_text("utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        return [f"{name}: not JSON ({type(error).__name__}: {error})"]
    errors = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{name}, {'/'.join(map(str, error.path)) or 'top'}: {error.message}" for error in errors]


def _program(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SelfcheckError(f"no {name} in {sys.prefix}; `nox -s validate` installs it")
    return found


def _keep_context(cache: Path) -> None:
    """Put RO-Crate's terms, which come with its library, where the validator looks before it asks the network."""
    import importlib.resources

    import requests_cache
    from requests.adapters import HTTPAdapter
    from urllib3.response import HTTPResponse

    terms = importlib.resources.files("rocrate").joinpath("data/ro-crate.jsonld").read_bytes()

    class Packaged(HTTPAdapter):
        def send(self, request: Any, *args: Any, **options: Any) -> Any:
            headers = {"Content-Type": "application/ld+json"}
            answer = HTTPResponse(io.BytesIO(terms), headers=headers, status=200, preload_content=False)
            return self.build_response(request, answer)

    with requests_cache.CachedSession(str(cache), expire_after=-1) as session:
        session.mount("https://", Packaged())
        session.get(f"https://w3id.org/ro/crate/{CRATE_VERSION}/context")
