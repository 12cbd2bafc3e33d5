"""How texts are compared that were written down or cut out: word errors, SQuAD's two scores."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def edits(actual: Sequence[str], expected: Sequence[str]) -> int:
    """The least number of words to put in, leave out or replace (Levenshtein's distance)."""
    row = list(range(len(actual) + 1))
    for count, word in enumerate(expected, 1):
        above, row[0] = row[0], count
        for place, other in enumerate(actual, 1):
            least = min(above + (word != other), row[place] + 1, row[place - 1] + 1)
            above, row[place] = row[place], least
    return row[-1]


def plain(text: str) -> str:
    """Lower case, without punctuation, its words one space apart."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def normalized(text: str) -> str:
    """As SQuAD's script compares answers: ``plain``, without articles (arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(reply: str, answers: Sequence[str]) -> float:
    """1 where the reply is one of the answers; where there is no answer, where it is empty."""
    return float(any(normalized(reply) == normalized(answer) for answer in answers or ("",)))


def f1(reply: str, answers: Sequence[str]) -> float:
    """Of the words of the reply and of the nearest answer: the harmonic mean of precision and
    recall."""
    return max(_f1(normalized(reply).split(), normalized(answer).split())
               for answer in answers or ("",))  # fmt: skip


def _f1(reply: Sequence[str], answer: Sequence[str]) -> float:
    if not reply or not answer:
        return float(reply == answer)
    shared = (Counter(reply) & Counter(answer)).total()
    return 2 * shared / (len(reply) + len(answer))
