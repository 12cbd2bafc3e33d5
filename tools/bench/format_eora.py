"""``python -m graphwright.tools.bench.format_eora --peer-python PYTHON``: EoRA on others' models.

zoo:tiny-llama as other tools quantize it: GPTQ in 3 bits and AWQ in 4 by gptqmodel, a GGUF file of
``Q2_K`` by llama.cpp (rows that 256 does not divide are ``Q4_0``, as its own tool has them). Of
each the two commands that a person types, ``clean`` and ``eora`` towards the original, and the
perplexity of both artifacts in ONNX Runtime on the texts that no calibration sees. The libraries'
environment is that of ``formats.py``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from rich.console import Console

from ...ir.load.zoo.text import SHIPPED, shipped_text
from . import format_writer, gguf_types
from .format_session import Session
from .processes import OPTIMIZE_MODEL, CommandFailed, environment, measure
from .showing import ended
from .structure_table import print_table

FORMS = {"gptq-3": 32, "awq": 16, "gguf Q2_K": 32}
"""The form, and the rank of its paths."""
COLUMNS = ("form", "perplexity of the original", "of the form", "with eora", "rank")
TEXTS = 256


def rows(peer: Session, forms: Sequence[str]) -> Iterator[list[str]]:
    """A row a form."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        calibration = place / "text.txt"
        texts = shipped_text("calibration")[:TEXTS]
        calibration.write_text("\n".join(text.replace("\n", " ") for text in texts))
        for form in forms:
            source = _made(peer, form, place / form.replace(" ", "-"))
            plain, paths = (place / f"{form}-{kind}".replace(" ", "-") for kind in ("is", "eora"))
            _command("run", source, "-p", "clean", "-o", plain)
            recipe = f"eora{{rank={FORMS[form]}}}"
            _command("run", source, "-p", recipe, "--original", SHIPPED,
                     "--calib", calibration, "-o", paths)  # fmt: skip
            values = _perplexities(SHIPPED, plain, paths)
            yield [form, *(f"{value:.2f}" for value in values), str(FORMS[form])]


def _made(peer: Session, form: str, out: Path) -> Path:
    """The model in a form, by the library that has it."""
    library, _, kind = form.partition(" ")
    if library != "gguf":
        _there(peer, format_writer.__file__, SHIPPED, out, form)
        return out
    whole = out.with_suffix(".whole")
    _command("run", SHIPPED, "-p", "clean", "-o", whole)
    _command("convert", whole, "--to", "gguf", "--out", out)
    path = out / f"{kind}.gguf"
    _there(peer, gguf_types.__file__, out / "model.gguf", path, kind)
    return path


def _there(peer: Session, script: str, *arguments: object) -> None:
    failure = peer.run(script, *arguments)
    if failure:
        raise CommandFailed(failure)


def _command(*words: object) -> str:
    return measure([*OPTIMIZE_MODEL, *map(str, words)], environment(None)).output


def _perplexities(*models: object) -> list[float]:
    report = json.loads(_command("eval", *models, "--tasks", "perplexity", "--json"))
    results = [subject["results"]["perplexity"] for subject in report["subjects"]]
    return [float(result["figures"]["perplexity"]) for result in results]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the forms, run the commands and print the table."""
    parser = argparse.ArgumentParser(
        prog="format_eora", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", required=True, help="of the libraries' environment")
    parser.add_argument("--forms", default=",".join(FORMS))
    options = parser.parse_args(arguments)

    def show(console: Console) -> None:
        with closing(Session(options.peer_python)) as peer:
            table = rows(peer, options.forms.split(","))
            print_table(COLUMNS, table, console, markdown=True)

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
