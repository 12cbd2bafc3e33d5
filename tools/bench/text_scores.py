"""``python -m graphwright.tools.bench.text_scores --python ENV/bin/python``: scores beside others'.

Word errors, and SQuAD's exact match and F1, of 2,000 random pairs of texts: ours against ``jiwer``
(PyPI) and the ``squad_metrics`` of transformers 4, in an environment that has both. With ``--add``
folders of packages that ``ENV`` lacks are read behind its own. Ends with 1 where one differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Sequence

from ..evaluate.word_scores import edits, exact, f1
from .processes import TAIL, CommandFailed, environment

PAIRS = 2000
WORDS = ("the", "The", "a", "cat", "cats,", "cat.", "an", "10", "red-hot", "it's", "of", "(x)")
ASK = """
import json, sys
sys.path += sys.argv[1:]
import jiwer
from transformers.data.metrics import squad_metrics as squad
pairs = json.load(sys.stdin)
rows = []
for actual, expected in pairs:
    row = jiwer.process_words(expected, actual) if expected else None
    errors = row.substitutions + row.deletions + row.insertions if row else len(actual.split())
    rows.append([errors, squad.compute_exact(expected, actual), squad.compute_f1(expected, actual)])
whole = jiwer.wer([e for _, e in pairs if e], [a for a, e in pairs if e])
print(json.dumps([whole, rows]))
"""


def texts(seed: int = 0) -> list[tuple[str, str]]:
    """Pairs of texts of 0 to 8 words, the second made of the first by a few changes."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(PAIRS):
        first = rng.choices(WORDS, k=rng.randint(0, 8))
        second = [rng.choice(WORDS) if rng.random() < 0.3 else word for word in first]
        second = second[rng.randint(0, 1) :] + rng.choices(WORDS, k=rng.randint(0, 2))
        pairs.append((" ".join(first), " ".join(second)))
    return pairs


def main(arguments: Sequence[str] | None = None) -> int:
    """Print how many scores differ; 1 where any does."""
    parser = argparse.ArgumentParser(prog="text_scores", description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with both packages")
    parser.add_argument("--add", action="append", default=[], help="a folder of packages")
    options = parser.parse_args(arguments)
    pairs = texts()
    done = subprocess.run(
        [options.python, "-c", ASK, *options.add], env=environment(None, {}), check=False,
        capture_output=True, text=True, input=json.dumps(pairs),
    )  # fmt: skip
    if done.returncode:
        raise CommandFailed(done.stderr[-TAIL:])
    whole, theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [[edits(a.split(), b.split()), exact(a, [b]), f1(a, [b])] for a, b in pairs]
    unequal = [sum(abs(x[i] - y[i]) > 1e-12 for x, y in zip(ours, theirs, strict=True))
               for i in range(3)]  # fmt: skip
    spoken = [(row[0], len(b.split())) for row, (_, b) in zip(ours, pairs, strict=True) if b]
    rate = sum(errors for errors, _ in spoken) / sum(words for _, words in spoken)
    print(f"of {PAIRS} pairs differ: word errors {unequal[0]}, exact {unequal[1]}, F1 {unequal[2]}")
    print(f"word error rate of all: {rate:.6f}, jiwer's {whole:.6f}")
    return int(any(unequal) or abs(rate - whole) > 1e-12)


if __name__ == "__main__":
    raise SystemExit(main())
