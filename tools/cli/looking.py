"""Commands that show what there is: passes, recipes, a model's structure, two artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...ir.core.errors import BadInput
from .options import Json, Model, Part, Trust, Verbose, make_console, print_json


def passes(name: Annotated[str, typer.Argument(metavar="[NAME]")] = "") -> None:
    """List the passes, or describe one with its options."""
    from . import listing

    console = make_console()
    if name:
        listing.print_pass(console, name)
    else:
        listing.print_passes(console)


def recipes() -> None:
    """List the built-in recipes."""
    from . import listing

    listing.print_recipes(make_console())


def inspect(
    model: Model,
    text: Annotated[bool, typer.Option("--text", help="Print the graph as text.")] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Tails of activations, dormant heads, forecasts.")
    ] = False,
    calib: Annotated[
        list[str] | None,
        typer.Option("--calib", help="Data for --outliers; several sets: how far they spread."),
    ] = None,
    calib_samples: Annotated[int | None, typer.Option("--calib-samples")] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option("-p", "--pass", help="A pass whose cost --outliers foretells; several."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page of what --outliers shows.")
    ] = None,
    part: Part = "",
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show what is recognised in MODEL: blocks, linears, attention sites."""
    if outliers or calib or passes or output:
        from . import outlook

        if not outliers or not calib:
            raise BadInput("--outliers needs --calib DATA, and --calib, -p and -o are for it")
        if part:
            raise BadInput("--outliers takes a whole model: leave out --part")
        outlook.print_outliers(
            make_console(), model, calib, passes or ["quantize"], samples=calib_samples,
            output=output, trust=trust_remote_code,
        )  # fmt: skip
        return
    from . import listing

    listing.print_structure(
        make_console(), model, text=text, trust_remote_code=trust_remote_code, part=part
    )


def diff(a: Path, b: Path, as_json: Json = False, verbose: Verbose = False) -> None:
    """Compare two artifacts: recipe, sizes, errors, site by site."""
    from ...ir.load.intact import check_files
    from ..report import manifest, manifest_diff
    from . import terminal

    known = [manifest.load(a), manifest.load(b)]
    for folder in (a, b):
        check_files(folder if folder.is_dir() else folder.parent)
    rows = manifest_diff.diff(*known)
    if as_json:
        print_json([row._asdict() for row in rows])
    else:
        terminal.print_diff(make_console(), rows, str(a), str(b))
