"""The text corpus of the zoo: its sources, its splits, and the models that only count."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from graphwright.ir.core.errors import Missing
from graphwright.ir.load.zoo.text import shipped_text
from graphwright.tools.zoo import corpus, ngram
from graphwright.tools.zoo.corpus import Document, split_documents


def sentence(number: int) -> str:
    words = np.random.default_rng(number).integers(0, 26, (40, 5))
    return " ".join("".join(chr(97 + c) for c in word) for word in words) + "."


def test_every_paragraph_goes_to_one_split_whatever_is_around_it() -> None:
    pages = [Document(f"p{i}", [sentence(3 * i + j) for j in range(3)]) for i in range(400)]
    splits = split_documents(pages)
    paragraphs = {s: set("\n\n".join(texts).split("\n\n")) for s, texts in splits.items()}
    assert sum(map(len, paragraphs.values())) == 1200
    for a, b in itertools.combinations(paragraphs, 2):
        assert not paragraphs[a] & paragraphs[b]
    shares = {s: len(p) / 1200 for s, p in paragraphs.items()}
    assert shares["train"] > 0.9
    assert all(0 < shares[s] < 0.05 for s in ("calibration", "validation", "test"))
    again = split_documents(reversed(pages))
    assert {s: set("\n\n".join(t).split("\n\n")) for s, t in again.items()} == paragraphs


def test_near_duplicates_do_not_cross_splits() -> None:
    """Each paragraph again with another ending: the two halves may fall to different splits."""
    pages = [Document(f"p{i}", [sentence(i)]) for i in range(600)]
    pages += [Document(f"q{i}", [sentence(i)[:-7] + " another end."]) for i in range(600)]
    splits = split_documents(pages)
    runs = {
        split: {run for text in texts for part in text.split("\n\n") for run in _runs(part)}
        for split, texts in splits.items()
    }
    for a, b in itertools.combinations(runs, 2):
        assert not runs[a] & runs[b], f"{a} and {b} share text"


def _runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}


def test_the_shipped_splits_share_no_text() -> None:
    """Runs of twelve words: near-duplicates were left out by runs of six."""
    test, calibration = (shipped_text(s) for s in ("test", "calibration"))
    assert min(len(test), len(calibration)) > 200
    known = {run for text in calibration for part in text.split("\n\n") for run in _runs(part)}
    total = shared = 0
    for text in test:
        for part in text.split("\n\n"):
            runs = _runs(part)
            total, shared = total + len(runs), shared + len(runs & known)
    assert total > 20_000
    assert shared < 0.02 * total


def test_repeated_paragraphs_are_kept_once() -> None:
    pages = [Document("a", [sentence(1), sentence(2)]), Document("b", [sentence(1).upper()])]
    texts = [t for split in split_documents(pages).values() for t in split]
    assert "\n\n".join(texts).lower().count(sentence(1)[:40]) == 1


def test_html_becomes_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    prose = "This is a paragraph of plain <b>English</b> words, long enough to be kept &amp; read."
    page.write_text(
        f"<html><title>No</title><script>var x = 'a long script, which is not prose at all.';"
        f"</script><p>{prose}</p><pre>{prose * 3}</pre><p>Too short.</p>"
        f"<p>{{}}[]();;=== 12345 67890 12345 67890 12345 67890 12345 67890 12345.</p></html>"
    )
    assert corpus._html_paragraphs(page) == [
        "This is a paragraph of plain English words, long enough to be kept & read."
    ]


def test_a_package_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(Missing, match="Debian's package no-such-doc: train on Debian"):
        corpus._unpacked("no-such-doc", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_baselines_by_hand() -> None:
    train = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])
    counts = np.array([4, 4, 4]) / 12
    assert ngram.unigram_perplexity(train, train, 3) == pytest.approx(1 / counts[0])
    # After "0 1" only 2 was seen, three times: (3 - .75) / 3 + .75 * 1 / 3 * P(2|1), and so on.
    one = 1.5 / 4.5
    two = (1 - 0.75) / 1 + 0.75 * one
    three = (3 - 0.75) / 3 + 0.75 / 3 * two
    assert ngram.trigram_perplexity(train, np.array([0, 1, 2]), 3) == pytest.approx(1 / three)
    # "2 2" was never seen, and 1 never after 2, after which one kind of token was: lower orders.
    unseen = np.array([2, 2, 1])
    assert ngram.trigram_perplexity(train, unseen, 3) == pytest.approx(1 / (0.75 * one))


def test_a_trigram_model_sums_to_one() -> None:
    train = np.random.default_rng(0).integers(0, 7, 500)
    for a, b in ((1, 2), (6, 6), (0, 3)):
        total = sum(
            1 / ngram.trigram_perplexity(train, np.array([a, b, c]), 7) for c in range(7)
        )
        assert total == pytest.approx(1.0)
