"""The three files of metadata that others' tools read: CITATION.cff, codemeta.json, .zenodo.json."""

from __future__ import annotations

import json
from typing import Any

import yaml

from .roots import Basis

ABOUT_ROOT = "Content root of the evidence (code, claims, verdicts and every value that repeats bit for bit)"
SPDX = "https://spdx.org/licenses/"


def _pretty(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _cff_authors(said: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"family-names": author["family"], "given-names": author["given"]}
        | ({"orcid": f"https://orcid.org/{author['orcid']}"} if "orcid" in author else {})
        for author in said["author"]
    ]


def cff(said: dict[str, Any], basis: Basis) -> bytes:
    """CITATION.cff (Citation File Format 1.2.0)."""
    preprint, companion = said["preprint"], said["companion"]
    identifiers = [{"type": "other", "value": basis.identifier, "description": ABOUT_ROOT}]
    document: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use this package, please cite the preprint.",
        "title": said["title"],
        "abstract": said["description"],
        "type": "software",
        "version": said["version"],
        **({"doi": said["doi"]} if said["doi"] else {}),
        **({"repository-code": said["repository"]} if said["repository"] else {}),
        "license": [licence["id"] for licence in said["licence"]],
        "authors": _cff_authors(said),
        "keywords": said["keywords"],
        "identifiers": identifiers,
        "preferred-citation": {
            "type": "article",
            "title": preprint["title"],
            "status": "preprint",
            "year": preprint["year"],
            "month": preprint["month"],
            "authors": _cff_authors(said),
        },
        "references": [
            {
                "type": "generic", "title": companion["title"], "doi": companion["doi"], "authors": _cff_authors(said),
            },
        ],
    }  # fmt: skip
    text = f"# Made from archive/metadata.toml by `python -m archive metadata`.\n{_yaml(document)}"
    return text.encode()


class _Plain(yaml.SafeDumper):
    """Without anchors, which readers of CITATION.cff need not know; lists are set in below their key."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        return super().increase_indent(flow, False)


def _yaml(document: dict[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=1000)


def _persons(said: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"@type": "Person", "givenName": author["given"], "familyName": author["family"]}
        | ({"@id": f"https://orcid.org/{author['orcid']}"} if "orcid" in author else {})
        for author in said["author"]
    ]


def codemeta(said: dict[str, Any], basis: Basis) -> bytes:
    """codemeta.json (CodeMeta 3.0)."""
    preprint, companion = said["preprint"], said["companion"]
    identifiers: list[Any] = [
        {"@type": "PropertyValue", "propertyID": "content root", "value": basis.identifier, "description": ABOUT_ROOT}
    ]
    if said["doi"]:
        identifiers.insert(0, f"https://doi.org/{said['doi']}")
    document: dict[str, Any] = {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": said["title"],
        "description": said["description"],
        "version": said["version"],
        "identifier": identifiers,
        **({"codeRepository": said["repository"]} if said["repository"] else {}),
        "license": [f"{SPDX}{licence['id']}" for licence in said["licence"]],
        "author": _persons(said),
        "keywords": said["keywords"],
        "programmingLanguage": ["Python", "Triton", "CUDA C++", "Coq"],
        "runtimePlatform": "Python 3.10 or newer",
        "dateModified": basis.date.isoformat(),
        "readme": "README.md",
        "referencePublication": {
            "@type": "ScholarlyArticle",
            "name": preprint["title"],
            "author": _persons(said),
            "datePublished": f"{preprint['year']}-{preprint['month']:02}",
        },
        "relatedLink": f"https://doi.org/{companion['doi']}",
    }
    return _pretty(document)


def zenodo(said: dict[str, Any], basis: Basis) -> bytes:
    """.zenodo.json (the metadata of a deposit, as Zenodo documents them).

    Without a DOI even once there is one: Zenodo mints its own, and takes a DOI here for another publisher's.
    """
    # A deposit has one licence; it is the code's, and the notes say the other's.
    first, *others = said["licence"]
    licences = ". ".join(f"{x['covers'].capitalize()}: {x['id']} ({x['file']})" for x in (first, *others))
    document: dict[str, Any] = {
        "title": said["title"],
        "upload_type": "software",
        "version": said["version"],
        "description": f"<p>{said['description']}</p>",
        "creators": [
            {"name": f"{x['family']}, {x['given']}"} | ({"orcid": x["orcid"]} if "orcid" in x else {})
            for x in said["author"]
        ],
        "access_right": "open",
        "license": first["id"],
        "keywords": said["keywords"],
        "notes": f"{licences}. {ABOUT_ROOT}: {basis.identifier}.",
        "related_identifiers": [
            {"scheme": "doi", "identifier": said["companion"]["doi"], "relation": "references"},
        ],
    }  # fmt: skip
    return _pretty(document)
