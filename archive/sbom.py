"""The software bill of materials: every package of requirements/*.txt as CycloneDX 1.6 JSON.

The same lists give the same bytes: no time, and a serial number that is derived from the components.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name

from selfcheck.harness.files import ROOT, SelfcheckError

from . import requirements

#: names of what is said of a component beside the standard's own fields: who installs it, and under which marker
ENVIRONMENT, MARKER = "qaxis:environment", "qaxis:marker"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "qaxis:sbom")


def components(root: Path = ROOT) -> list[Component]:
    """One component a package and version, with the digests of all its files, sorted.

    Raises:
        SelfcheckError: if a line of requirements/*.txt cannot be read, or there is none.
    """
    uses: dict[tuple[str, str], list[tuple[str, requirements.Locked]]] = defaultdict(list)
    for environment, lines in requirements.environments(root).items():
        for line in lines:
            uses[canonicalize_name(line.name), line.version].append((environment, line))
    if not uses:
        raise SelfcheckError(f"{root / requirements.FOLDER}: no lists of requirements (*.txt)")
    return [_component(name, version, use) for (name, version), use in sorted(uses.items())]


def _component(name: str, version: str, uses: list[tuple[str, requirements.Locked]]) -> Component:
    purl = PackageURL("pypi", name=name, version=version)
    digests = sorted({digest for _, line in uses for digest in line.hashes})
    said = {(ENVIRONMENT, environment) for environment, _ in uses}
    said |= {(MARKER, str(line.requirement.marker)) for _, line in uses if line.requirement.marker}
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        purl=purl,
        bom_ref=str(purl),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in digests],
        properties=[Property(name=key, value=value) for key, value in sorted(said)],
    )


def render(root: Path = ROOT) -> bytes:
    """The bill as JSON.

    Raises:
        SelfcheckError: as ``components``, or if the standard's own validator refuses what was made.
    """
    document = json.loads(JsonV1Dot6(Bom(components=components(root))).output_as_string())
    # The library says when and under which random number it was made; neither is of the content.
    document["metadata"].pop("timestamp")
    content = json.dumps(document["components"], sort_keys=True)
    document["serialNumber"] = uuid.uuid5(NAMESPACE, content).urn
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise SelfcheckError(f"the bill of materials is not CycloneDX 1.6: {error}")
    return text.encode()
