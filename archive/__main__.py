"""Command line: ``python -m archive [bind|verify|metadata|doi|statement|pack|unpack|check|validate]``; nox calls it."""

from selfcheck import isolated

if __name__ == "__main__":
    isolated.enter("archive")

import sys
import tempfile
from pathlib import Path

import click

from selfcheck.harness import surroundings
from selfcheck.harness.files import ROOT, SelfcheckError

from . import signing


@click.group()
def main() -> None:
    """What describes, binds, signs and packs this package."""


@main.command("bind")
@click.option("--output", metavar="FOLDER", help=surroundings.OUTPUT_HELP)
def bind_command(output: str | None) -> None:
    """Write what speaks of the evidence (README.md's numbers, metadata), and the manifest over every output."""
    from . import bind

    made = bind.bind(output=surroundings.absolute(output))
    click.echo(f"bound in {made.path}\ncontent root {made.content_root} ({made.said})")


@main.command("verify")
@click.option("--root", type=Path, default=ROOT, metavar="FOLDER", help="Another tree, read by the code of this one.")
def verify_command(root: Path) -> None:
    """Say of every file and claim whether it is intact, stale, edited, forged or not run, and what mends it."""
    from . import verify

    rows, intact = verify.report(root.resolve())
    shown = [row for row in rows if not row.good] if not intact else rows
    wide = max(len(row.name) for row in shown)
    for row in shown:
        said = f"{row.name:<{wide}}  {row.word:<8} {row.why}".rstrip()
        click.echo(said + (f"\n{'':<{wide}}  -> {row.mend}" if row.mend and not row.good else ""))
    words = [row.word for row in rows]
    click.echo(", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)))
    if not intact:
        raise SelfcheckError(f"{root}: not intact")


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
    click.echo("now `nox -s seal paper`, commit, sign again if you sign, and pack")


@main.command("statement")
@click.option("--sign", type=Path, metavar="KEYFILE", help="Sign it with this private SSH key.")
def statement_command(sign: Path | None) -> None:
    """Write statement.json: which commit, lock, evidence and outputs belong together."""
    from . import pack

    click.echo("\n".join(pack.state(sign)))


@main.command("pack")
@click.option("--output", type=Path, default=ROOT / "build", metavar="FOLDER", help="Where it goes; build if not said.")
def pack_command(output: Path) -> None:
    """Pack the tracked files and what describes them: the same bytes each time."""
    from . import pack

    made, packed, plain = pack.pack(output)
    click.echo(f"{packed}  {made}\n{plain}  the .tar inside\n{signing.described(ROOT, ROOT / signing.ALLOWED)}")


@main.command("unpack")
@click.argument("file", type=Path)
@click.argument("folder", type=Path)
def unpack_command(file: Path, folder: Path) -> None:
    """Unpack an archive into an empty folder, refusing what is not a plain file in it."""
    from .unpack import unpack

    click.echo(unpack(file, folder))


@main.command("check")
@click.argument("file", type=Path)
@click.option("--no-selfcheck", is_flag=True, help="Leave the quick self-check out.")
@click.option("--only", multiple=True, metavar="CLAIM", help="Of the self-check, this claim only; may be repeated.")
@click.option(
    "--allowed-signers", type=Path, default=ROOT / signing.ALLOWED, metavar="FILE",
    help="Whose signatures count; this tree's archive/allowed_signers if not said, never the archive's own.",
)  # fmt: skip
def check_command(file: Path, no_selfcheck: bool, only: tuple[str, ...], allowed_signers: Path) -> None:
    """Unpack an archive elsewhere, verify it, redraw it, compare bytes, and measure again. Runs the archive's code."""
    from . import check

    asked = check.Asked(allowed_signers.resolve(), not no_selfcheck, only)
    steps = check.check(file.resolve(), asked, click.echo)
    for step in steps:
        click.echo(f"{'ok   ' if step.ok else 'WRONG'} {step.name:<20} " + step.said.replace("\n", "\n" + 27 * " "))
    if wrong := [step.name for step in steps if not step.ok]:
        raise SelfcheckError(f"{file}: wrong in {', '.join(wrong)}")


@main.command("validate")
@click.argument("file", type=Path)
def validate_command(file: Path) -> None:
    """Show the metadata of an archive, packed or unpacked, to the tools that read them."""
    from . import validate
    from .unpack import unpack

    with tempfile.TemporaryDirectory(prefix="qaxis-archive-") as folder:
        click.echo("\n".join(validate.run(file if file.is_dir() else unpack(file, Path(folder) / "unpacked"))))


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
