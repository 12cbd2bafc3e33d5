"""What commands share: options, consoles, choices.

Results go to stdout, everything else to stderr. What a command needs is imported in it: help comes
at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.core.errors import BadInput, near_misses

if TYPE_CHECKING:
    from rich.console import Console

MODEL_HELP = (
    "zoo:NAME, a Hugging Face folder or id, FILE.onnx, FILE.pt2, FILE.gguf, or "
    "package.module:factory"
)


def checked_model(name: str) -> str:
    """Before a command begins, of whose many imports a wrong name needs none."""
    from ...ir.load.names import check_name

    check_name(name)
    return name


def said(ctx: typer.Context, param: typer.CallbackParam, text: str) -> str:
    """Before a command begins: an option that is given says something, unlike a variable of a
    script that is not set. Without it, what is left out would be chosen."""
    source = ctx.get_parameter_source(param.name or "")
    if source is not None and source.name == "COMMANDLINE" and not text.strip():
        name = next(name for name in param.opts if name.startswith("--"))
        raise BadInput(f"{name} is empty: give a value, or leave it out")
    return text


def checked_passes(ctx: typer.Context, param: typer.CallbackParam, text: str) -> str:
    """Likewise: what passes and options are called."""
    from ...passes.option_names import check_names

    if said(ctx, param, text):
        check_names(text)
    return text


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, callback=checked_model)]
Passes = Annotated[
    str, typer.Option("-p", "--passes", help="Passes, as text.", callback=checked_passes)
]
Json = Annotated[bool, typer.Option("--json", help="Print the manifest, and only it, on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a hub model run its code.")]
TrustSource = Annotated[
    bool,
    typer.Option("--trust-source", help="Load what the manifest names, though that runs code."),
]
Part = Annotated[
    str,
    typer.Option(
        help="encoder, decoder or decoder_with_past of an encoder-decoder; sounds of Phi-4."
    ),
]


def make_console(*, stderr: bool = False) -> Console:
    from .terminal import VisibleConsole

    return VisibleConsole(stderr=stderr)


def print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, sort_keys=True) + "\n")


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadInput(f"--{option} {value} is unknown; {near_misses(value, known)}")
