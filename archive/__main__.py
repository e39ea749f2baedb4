"""Command line: ``python -m archive [metadata|doi|statement|pack|unpack|check|verify|validate]``; nox calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from selfcheck.harness import seal
from selfcheck.harness.files import ROOT, SelfcheckError


@click.group()
def main() -> None:
    """What describes, binds, signs and packs this package."""


@main.command("metadata")
def metadata_command() -> None:
    """Write CITATION.cff, codemeta.json and .zenodo.json from archive/metadata.toml and the evidence."""
    from . import metadata

    click.echo("\n".join(f"wrote {name}" for name in metadata.write()))


@main.command("doi")
@click.argument("minted")
def doi_command(minted: str) -> None:
    """Fill in the DOI that was minted (10.5281/zenodo.NUMBER), everywhere that says it."""
    from . import metadata

    click.echo("\n".join(f"wrote {name}" for name in metadata.set_doi(minted)))
    click.echo("README.md and the paper read it from there: `nox -s paper`, then bind and seal what changed")


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except SelfcheckError as error:
        sys.exit(f"archive: {error}")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit("archive: interrupted")
