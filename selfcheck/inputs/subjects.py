"""Load the model and the articles: the pinned package files, or what the user names."""

from __future__ import annotations

import bz2
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..harness import seal
from ..harness.files import SelfcheckError, sha256

MINIMUM_CHARACTERS = 2000


def window(quick: bool) -> tuple[int, int]:
    """(texts, tokens of each) that every claim of the model shares."""
    return (2, 512) if quick else (8, 2048)


def locate(subject: dict[str, str]) -> Path:
    """Path of a pinned package file, verified.

    Raises:
        SelfcheckError: if it is missing or differs, with both digests and what to do.
    """
    spec = importlib.util.find_spec(subject["module"])
    fix = f"run `python -m pip install --force-reinstall --no-deps {subject['requirement']}`"
    if spec is None or not spec.submodule_search_locations:
        raise SelfcheckError(f"{subject['file']} (SHA-256 {subject['sha256']}): not installed; {fix}")
    return check_file(Path(spec.submodule_search_locations[0]) / subject["file"], subject["sha256"], fix)


def check_file(path: Path, digest: str, fix: str) -> Path:
    """``path`` if it exists and has this SHA-256, else SelfcheckError naming both digests."""
    if not path.is_file():
        raise SelfcheckError(f"{path.name}: missing, expected SHA-256 {digest}; {fix}")
    actual = sha256(path)
    if actual != digest:
        raise SelfcheckError(
            f"{path.name}: corrupted\n  expected SHA-256 {digest}\n  found    SHA-256 {actual}\n  {fix}"
        )
    return path


@dataclass(frozen=True)
class Subjects:
    """Loaded model, tokenizer and the tokenised articles (int64 ``[1, n]`` each)."""

    model: Any
    tokenizer: Any
    texts: list[torch.Tensor]
    digests: dict[str, str]


def _digest_of(name: str) -> str:
    path = Path(name)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return "+".join(sha256(p)[:16] for p in files) or f"name:{name}"


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, each GGUF file is parsed once and its architecture's names are mapped once.

    transformers parses it for the tokenizer, the configuration and the weights, and maps the names once a module.
    """
    import gguf

    library: Any = gguf
    before = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = (lru_cache(maxsize=2)(x) for x in before)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = before


def load_model(name: str | None, device: str) -> tuple[Any, Any, str]:
    """(model in float32 and eval mode, tokenizer, digest). ``None`` is the pinned GGUF file.

    A ``.gguf`` file, a directory in transformers' format, or a hub name is also accepted.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if name is None:
        subject = seal.subjects()["model"]
        path, digest = locate(subject), subject["sha256"]
    else:
        path, digest = Path(name), _digest_of(name)
        if not path.exists() and ("\\" in name or name.count("/") != 1):
            raise SelfcheckError(
                f"--model={name!r}: no such file or directory; a path or a hub name OWNER/MODEL is allowed"
            )
    if path.suffix == ".gguf":
        options["gguf_file"] = path.name
        source = str(path.parent)
    else:
        source = name or str(path)
    try:
        with parsed_once() if options else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="sdpa", **options
            )
    except (OSError, ValueError) as error:
        raise SelfcheckError(f"--model={name!r}: transformers could not load it: {error}") from error
    return model.eval().to(device), tokenizer, digest


class _Kept:
    """An iterator's items, each made once however often they are walked through."""

    def __init__(self, source: Iterator[str]) -> None:
        self.source, self.items = source, list[str]()

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            if at == len(self.items):
                following = next(self.source, None)
                if following is None:
                    return
                self.items.append(following)
            yield self.items[at]
            at += 1


@lru_cache(maxsize=2)
def _articles(path: Path) -> _Kept:
    # Several claims want texts of their own length, and parsing the markup takes seconds.
    return _Kept(_parsed(path))


def articles(path: Path) -> Iterator[str]:
    """Plain text of the whole articles of a MediaWiki dump (.bz2)."""
    return iter(_articles(path))


def _parsed(path: Path) -> Iterator[str]:
    import mwparserfromhell
    import mwxml

    with bz2.open(path) as stream:
        for page in mwxml.Dump.from_file(stream):
            if page.namespace != 0 or page.redirect:
                continue
            for revision in page:
                text = mwparserfromhell.parse(revision.text or "").strip_code()
                if len(text) >= MINIMUM_CHARACTERS:
                    yield text


def documents(name: str | None) -> tuple[Iterator[str], str]:
    """(texts, digest): the pinned dump, a local .bz2 dump, a .txt/.json/.parquet file or directory, or a hub name."""
    if name is None:
        subject = seal.subjects()["corpus"]
        return articles(locate(subject)), subject["sha256"]
    path = Path(name)
    if path.suffix == ".bz2" and path.is_file():
        return articles(path), _digest_of(name)
    import datasets

    formats = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if path.is_file() and path.suffix in formats:
        options = {"sample_by": "document"} if path.suffix == ".txt" else {}
        rows = datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train", **options)
    elif path.is_dir():
        rows = datasets.load_from_disk(str(path))
    elif name in ("wikitext", "wikitext-2"):
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        rows = datasets.load_dataset(name, split="train")
    else:
        raise SelfcheckError(
            f"--corpus={name!r}: no such file; a .bz2 dump, .txt, .json, .parquet or OWNER/DATASET is allowed"
        )
    if isinstance(rows, datasets.DatasetDict):
        rows = rows[next(iter(rows))]
    if "text" not in rows.column_names:
        raise SelfcheckError(f"--corpus={name!r}: columns {rows.column_names}; a column 'text' is needed")
    texts: list[str] = list(rows["text"])
    if texts and sum(map(len, texts)) / len(texts) < MINIMUM_CHARACTERS:
        # Line-wise corpora (WikiText): the running text is the document.
        joined = "".join(t if t.endswith("\n") else t + "\n" for t in texts)
        texts = [joined[i : i + 16000] for i in range(0, len(joined), 16000)]
    return iter(texts), _digest_of(name)


def texts_of(tokenizer: Any, source: Iterator[str], device: str, count: int, tokens: int) -> list[Any]:
    """The first ``count`` texts that have ``tokens`` tokens, cut to that length, each int64 ``[1, tokens]``."""
    texts = []
    for text in source:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens).input_ids
        if ids.shape[1] == tokens:
            texts.append(ids.to(device))
        if len(texts) == count:
            return texts
    raise SelfcheckError(f"--corpus: {len(texts)} texts of {tokens} tokens found, {count} are needed")


def load(model_name: str | None, corpus_name: str | None, device: str, count: int, tokens: int) -> Subjects:
    """Load the model and the first ``count`` texts of ``tokens`` tokens."""
    model, tokenizer, model_digest = load_model(model_name, device)
    source, corpus_digest = documents(corpus_name)
    texts = texts_of(tokenizer, source, device, count, tokens)
    return Subjects(model, tokenizer, texts, {"model": model_digest, "corpus": corpus_digest})
