"""English text without a download from the web: documentation of free software, split by hash.

Sources: ``pydoc_data.topics``, docstrings of the standard library, and the HTML manuals of the
Debian packages in ``PACKAGES``, fetched by name with ``apt-get download``. All these manuals have
licences that let their text travel with a package under Apache-2.0 (PSF, PostgreSQL, public domain,
Apache-2.0, BSD, MIT).

``python -m graphwright.tools.zoo.corpus FOLDER [--package sqlite3-doc]`` writes three sets of text
to calibrate on, one of each kind of source: ``pydoc.jsonl``, ``docstrings.jsonl`` and
``debian.jsonl``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ...ir.core.errors import Missing

PACKAGES = (
    "python3.11-doc", "postgresql-doc-15", "sqlite3-doc", "apache2-doc", "python-django-doc",
    "python-sqlalchemy-doc", "llvm-14-doc", "cmake-doc",
)  # fmt: skip
Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = {"calibration": 0.01, "validation": 0.01, "test": 0.02}
"""Of the paragraphs; the rest is for training."""
SHINGLE = 6
"""Words in a row. Two paragraphs that share ``OVERLAP`` of the shorter one's runs of six words are
near-duplicates."""
OVERLAP = 0.2


class Document(NamedTuple):
    """A page: its name, and its paragraphs in order."""

    name: str
    paragraphs: list[str]


def documents(cache: Path) -> Iterator[Document]:
    """Every page of every source, in a fixed order. ``cache`` keeps the packages' files.

    Raises ``Missing`` where a package cannot be fetched.
    """
    yield from _topics()
    yield from _docstrings()
    for package in PACKAGES:
        yield from _manual(package, cache)


def split_documents(pages: Iterable[Document]) -> dict[Split, list[str]]:
    """Texts of each split: the paragraphs of a page that fell to the split, joined by blank lines.

    A paragraph goes where the hash of its words says, so that the same paragraph goes to the same
    split in every document, on every machine. Repeated paragraphs are kept once. What is
    nearly the same as a paragraph of an earlier split in the order test, validation, calibration,
    train is dropped, so that no split has seen another's text.
    """
    placed: dict[Split, list[tuple[int, str]]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for number, page in enumerate(pages):
        for text in page.paragraphs:
            key = " ".join(_words(text))
            if key not in seen:
                seen.add(key)
                placed[_split_of(key)].append((number, text))
    taken: set[int] = set()
    texts: dict[Split, list[str]] = {}
    for split in reversed(SPLITS):
        kept = [(n, text) for n, text in placed[split] if not _is_near(_shingles(text), taken)]
        texts[split] = _joined(kept)
        if split != "train":
            for _, text in kept:
                taken |= _shingles(text)
    return texts


def _joined(paragraphs: Iterable[tuple[int, str]]) -> list[str]:
    pages: dict[int, list[str]] = {}
    for number, text in paragraphs:
        pages.setdefault(number, []).append(text)
    return ["\n\n".join(texts) for texts in pages.values()]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _split_of(key: str) -> Split:
    digest = hashlib.sha256(key.encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    for split in ("calibration", "validation", "test"):
        if point < SHARES[split]:
            return split
        point -= SHARES[split]
    return "train"


def _shingles(text: str) -> set[int]:
    words = _words(text)
    runs = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    hashes = (hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return {int.from_bytes(digest, "big") for digest in hashes}


def _is_near(shingles: set[int], taken: set[int]) -> bool:
    return len(shingles & taken) > OVERLAP * len(shingles)


# --- sources ------------------------------------------------------------------------------------


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", _plain_paragraphs(topics[name]))


def _docstrings() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except SyntaxError:
            continue  # a template, or a file kept for the tests of the compiler
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
        paragraphs = [p for text in texts if text for p in _plain_paragraphs(text)]
        yield Document(f"stdlib/{path.relative_to(root)}", paragraphs)


def _manual(package: str, cache: Path) -> Iterator[Document]:
    for path in sorted(_unpacked(package, cache).rglob("*.html")):
        if _is_english(path):
            yield Document(f"{package}/{path.name}", _html_paragraphs(path))


def _plain_paragraphs(text: str) -> list[str]:
    return _prose(re.split(r"\n\s*\n", text))


def _prose(texts: Iterable[str]) -> list[str]:
    """Those of the texts that read as English sentences, with their spaces made single."""
    kept = []
    for text in texts:
        joined = " ".join(text.split())
        letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in joined)
        if len(joined) >= 60 and letters >= 0.85 * len(joined) and ". " in joined + " ":
            kept.append(joined)
    return kept


class _Paragraphs(HTMLParser):
    """Collects the text of paragraphs, list items and definitions; code blocks stay out."""

    BLOCKS = frozenset({"p", "li", "dd", "dt", "td", "th", "div", "h1", "h2", "h3", "h4", "tr"})
    SILENT = frozenset({"pre", "script", "style", "nav", "title", "svg"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self._parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SILENT:
            self._silent += 1
        if tag in self.BLOCKS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self._silent = max(0, self._silent - 1)
        if tag in self.BLOCKS:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self._parts.append(data)

    def close(self) -> None:
        super().close()
        self._flush()

    def _flush(self) -> None:
        self.texts.append("".join(self._parts).replace("¶", ""))
        self._parts.clear()


def _html_paragraphs(path: Path) -> list[str]:
    parser = _Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    return _prose(parser.texts)


def _is_english(path: Path) -> bool:
    """The Apache manual has a folder for each language."""
    return "manual" not in path.parts or "en" in path.parts


def _unpacked(package: str, cache: Path) -> Path:
    target = cache / package
    if target.is_dir():
        return target
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Missing(f"the corpus needs Debian's package {package}: train on Debian or Ubuntu")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        fetched = subprocess.run(
            ["apt-get", "download", package], cwd=work, capture_output=True, text=True, check=False
        )
        archives = list(Path(work).glob("*.deb"))
        if not archives:
            raise Missing(
                f"apt-get download {package} failed: {fetched.stderr.strip()[-200:]}. "
                "Run `apt-get update`, or train on Debian 12"
            )
        unpacked = Path(work) / "unpacked"
        subprocess.run(["dpkg-deb", "-x", str(archives[0]), str(unpacked)], check=True)
        unpacked.rename(target)
    return target


# --- sets to calibrate on -----------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", default="sqlite3-doc", help="of Debian, with a manual in HTML")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "pydoc": _topics(), "docstrings": _docstrings(),
        "debian": _manual(options.package, options.folder / "packages"),
    }  # fmt: skip
    for name, pages in sets.items():
        texts = ["\n\n".join(page.paragraphs) for page in pages if page.paragraphs]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (options.folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(texts)} pages, {sum(map(len, texts))} letters")


if __name__ == "__main__":
    main()
