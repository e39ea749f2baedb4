"""Packing: the tracked files and what describes them, in one reproducible file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from selfcheck.harness import seal
from selfcheck.harness.files import ROOT, SelfcheckError, write_atomic

from . import crate, listing, metadata, roots, statement, tarball, tree


def contents(found: tree.Tree, sbom: bytes, root: Path = ROOT, *, signed: bool = True) -> dict[str, bytes]:
    """Every file of the archive. The signature comes from the tree, if one lies there and it is asked for.

    Raises:
        SelfcheckError: if that signature was made for another statement than this one.
    """
    made = {tree.SBOM: sbom}
    made[tree.CRATE] = crate.render(found, made, root)
    made[listing.MANIFEST] = listing.render({**found.files, **made})
    made[tree.STATEMENT] = statement.render(found, made[listing.MANIFEST], root)
    if signed and (root / tree.SIGNATURE).exists():
        stated = root / tree.STATEMENT
        if not stated.is_file() or stated.read_bytes() != made[tree.STATEMENT]:
            raise SelfcheckError(
                f"{tree.SIGNATURE} was made for another state of the tree; sign again with "
                "`nox -s statement -- --sign KEYFILE`, or delete it"
            )
        made[tree.SIGNATURE] = (root / tree.SIGNATURE).read_bytes()
    return {**found.files, **made}


def collected(root: Path = ROOT, *, signed: bool = True) -> tuple[tree.Tree, dict[str, bytes]]:
    """The tree and every file of its archive, once seal, outputs and metadata are found as they should be.

    Raises:
        SelfcheckError: naming what is not.
    """
    from . import sbom, verify

    seal.verify(root)
    _, intact = verify.report(root)
    if not intact:
        raise SelfcheckError(
            "the tree is not intact; `nox -s verify` says what is stale, edited or missing, and what mends it"
        )
    if wrong := metadata.differences(root):
        raise SelfcheckError("\n  ".join(wrong))
    found = tree.read(root)
    return found, contents(found, sbom.render(root), root, signed=signed)


def pack(output: Path, root: Path = ROOT) -> tuple[Path, str, str]:
    """Write qaxis-VERSION.tar.gz below ``output``; returns it and the SHA-256 of it and of the .tar inside."""
    found, files = collected(root)
    folder = f"qaxis-{metadata.load(root)['version']}"
    data = tarball.tar(files, found.executable, folder, int(roots.newest(root).timestamp()))
    packed = tarball.gzipped(data)
    made = output / f"{folder}.tar.gz"
    write_atomic(made, packed)
    return made, hashlib.sha256(packed).hexdigest(), hashlib.sha256(data).hexdigest()


def state(key: Path | None, root: Path = ROOT) -> list[str]:
    """Write the statement into the tree, signed if a key is given; says what was written."""
    from . import signing

    if key is not None:
        signing.check_key(key)
    made = collected(root, signed=False)[1][tree.STATEMENT]
    signature = signing.signature(key, made) if key is not None else None
    # Only now: whatever was wrong until here left the former statement and its signature as they were.
    (root / tree.SIGNATURE).unlink(missing_ok=True)
    write_atomic(root / tree.STATEMENT, made)
    if signature is None:
        return [f"wrote {tree.STATEMENT}, {signing.UNSIGNED}"]
    write_atomic(root / tree.SIGNATURE, signature)
    said = signing.described(root, root / signing.ALLOWED)
    return [f"wrote {tree.STATEMENT} and {tree.SIGNATURE}, which `nox -s archive` packs", said]
