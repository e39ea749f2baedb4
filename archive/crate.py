"""ro-crate-metadata.json: what the archive holds, who made it and under which licences, for machines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError

from . import metadata, roots
from .citation import SPDX
from .listing import MANIFEST
from .tree import CRATE, CRATE_VERSION, SBOM, STATEMENT, Tree

PDF = "paper/paper.pdf"
#: files that are described one by one: name, what it is, its media type
FILES = (
    (PDF, "The paper, rebuilt from the evidence", "application/pdf"),
    ("paper/paper.tex", "Its source", "text/x-tex"),
    ("paper/numbers.tex", "Its numbers, made from the evidence", "text/x-tex"),
    (evidence.DEFAULT, "Evidence measured on a CPU, one record a claim", "application/json"),
    (evidence.GPU, "Evidence measured on GPUs, one record a claim and card", "application/json"),
    (seal.LOCK, "The lock: SHA-256 of every sealed file and subject", "application/toml"),
    ("selfcheck/checks.toml", "The claims", "application/toml"),
    ("archive/manifest.json", "SHA-256 of every output, and of what made it", "application/json"),
    ("README.md", "Where to begin", "text/markdown"),
    ("CITATION.cff", "How to cite", "application/yaml"),
    ("codemeta.json", "Metadata of the software", "application/ld+json"),
    (SBOM, "What the package is installed with (CycloneDX)", "application/vnd.cyclonedx+json"),
)  # fmt: skip
FOLDERS = {
    "src/": "The library", "selfcheck/": "The self-check and its evidence",
    "figures/": "The figures and what draws them", "paper/": "The paper and what builds it",
    "tests/": "Tests of what is not a claim", "archive/": "What binds, verifies, states and packs",
    "requirements/": "Every package of every environment, by hash", "examples/": "Scripts to start from",
    "benchmarks/": "Speed, and other packages beside this one",
}  # fmt: skip
DATA = ("selfcheck/evidence/", "paper/", "figures/", "README", "CITATION", "codemeta")


def render(tree: Tree, made: dict[str, bytes], root: Path = ROOT) -> bytes:
    """The metadata of an archive of a tree's files and of those ``made`` beside it: the same bytes for the same.

    Raises:
        SelfcheckError: if metadata.toml is not as it should be, or names a licence that is not in the tree.
    """
    from rocrate.rocrate import ROCrate

    said, newest, files = metadata.load(root), roots.newest(root).isoformat(), {**tree.files, **made}
    crate = ROCrate(version=CRATE_VERSION)
    authors = [_add(crate, **_person(author, number)) for number, author in enumerate(said["author"], 1)]
    licences = {x["id"]: _add(crate, **_licence(x)) for x in said["licence"]}
    for folder, about in FOLDERS.items():
        if any(name.startswith(folder) for name in files):
            crate.add_dataset(dest_path=folder, properties={"name": about})
    for name, about, media in FILES:
        if name in files:
            crate.add_file(dest_path=name, properties=_file(files[name], about, media))
    for name, about in ((MANIFEST, "SHA-256 of every file but the statement"), (STATEMENT, "The in-toto statement")):
        media = "application/json" if name == STATEMENT else "text/plain"
        crate.add_file(dest_path=name, properties={"name": about, "encodingFormat": media})
    for file in crate.data_entities:
        if not file.id.endswith("/"):
            file["license"] = licences["CC-BY-4.0" if file.id.startswith(DATA) else "MIT"]
    for licence in said["licence"]:
        name = licence["file"]
        if name not in files:
            raise SelfcheckError(f"{metadata.SOURCE}: file = {name!r}: allowed is a file of the tree, and this is none")
        crate.add_file(dest_path=name, properties=_file(files[name], f"The licence {licence['id']}", "text/plain"))
    _describe(crate, said, newest, authors, list(licences.values()), tree.swhid, root)
    graph = crate.metadata.generate()
    graph["@graph"].sort(key=lambda entity: (entity["@id"] not in (CRATE, "./"), entity["@id"]))
    return (json.dumps(graph, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _add(crate: Any, identifier: str, **properties: Any) -> Any:
    return crate.add_jsonld({"@id": identifier, **properties})


def _person(author: dict[str, str], number: int) -> dict[str, Any]:
    orcid = f"https://orcid.org/{author['orcid']}" if "orcid" in author else f"#author-{number}"
    given, family = author["given"], author["family"]
    return {
        "identifier": orcid, "@type": "Person", "name": f"{given} {family}", "givenName": given, "familyName": family,
    }  # fmt: skip


def _licence(licence: dict[str, str]) -> dict[str, Any]:
    about = f"For {licence['covers']}; the text is in {licence['file']}"
    return {
        "identifier": f"{SPDX}{licence['id']}", "@type": "CreativeWork", "name": licence["id"], "description": about,
    }  # fmt: skip


def _file(data: bytes, about: str, media: str) -> dict[str, Any]:
    return {
        "name": about, "encodingFormat": media, "contentSize": str(len(data)),
        "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip


def _describe(
    crate: Any, said: dict[str, Any], newest: str, authors: list[Any], licences: list[Any], swhid: str, root: Path
) -> None:
    """The root: what it is, by whom, of when, and what it can be found and compared by."""
    top = crate.root_dataset
    identifiers = [
        _value(crate, "content-root", "content root of the evidence", f"sha256:{roots.content_root(root)}"),
        _value(crate, "swhid", "SWHID of the source tree", swhid),
    ]
    if said["doi"]:
        identifiers.insert(0, _value(crate, "doi", "DOI", f"https://doi.org/{said['doi']}"))
    top["name"], top["description"] = said["title"], said["description"]
    # The date of its newest evidence: an archive says nothing that was not there when that was measured.
    crate.datePublished = newest
    top["version"], top["keywords"] = said["version"], said["keywords"]
    top["author"], top["license"], top["identifier"] = authors, licences, identifiers
    top["mainEntity"] = crate.get(PDF)
    software = _add(crate, "#qaxis", **{"@type": "SoftwareApplication"}, name="qaxis", version=said["version"],
                    url=said["repository"] or f"https://doi.org/{said['companion']['doi']}")  # fmt: skip
    made = _add(crate, "#paper-built", **{"@type": "CreateAction"}, name="The paper, built from the evidence",
                endTime=newest)  # fmt: skip
    made["instrument"] = software
    made["object"] = [x for name in ("paper/paper.tex", evidence.DEFAULT, evidence.GPU) if (x := crate.get(name))]
    made["result"] = crate.get(PDF)
    top["mentions"] = made


def _value(crate: Any, identifier: str, name: str, value: str) -> Any:
    return _add(crate, f"#{identifier}", **{"@type": "PropertyValue"}, name=name, propertyID=name, value=value)
