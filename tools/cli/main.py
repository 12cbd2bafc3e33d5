"""``optimize-model``: the command line's entry point, and how each error ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ...ir.core.errors import GraphwrightError, Missing, near_misses
from ...ir.core.version import __version__
from . import artifacts, judging, looking, optimizing, threads
from .options import make_console

_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""``ClickException``, of click or of the copy of click that newer releases of typer carry."""
COMMANDS: dict[str, Callable[..., None]] = {
    "run": optimizing.run, "passes": looking.passes, "recipes": looking.recipes,
    "inspect": looking.inspect, "explain": optimizing.explain, "diff": looking.diff,
    "replay": artifacts.replay, "resize": artifacts.resize, "front": artifacts.front,
    "convert": artifacts.convert, "generate": artifacts.generate, "rerank": artifacts.rerank,
    "bench": judging.bench, "eval": judging.evaluate, "compare-tokens": judging.compare_tokens,
}  # fmt: skip
"""In the order of the help."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"graphwright {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Rewrite transformer models as graphs: smaller, faster, checked after every pass.

    `optimize-model MODEL -p 'quantize{bits=8 group=64}' -o OUT` is short for `optimize-model run`.
    """


for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: runs a command and exits with the contract's code (0, 1, 2, 3 or 130)."""
    threads.share_the_cores()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments[0] == "eval" and arguments[-1] == "--tasks":
        arguments.append(judging.LIST_TASKS)
    if arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        near = _near_commands(arguments[0])
        if near:
            _tell(f"there is no command {arguments[0]!r}, and no model of that name; {near}")
            sys.exit(2)
        arguments.insert(0, "run")
    sys.exit(_guarded(arguments))


def _near_commands(word: str) -> str:
    """Near misses of a mistyped command; empty for an option, and for what may be a model."""
    if word.startswith("-") or not set(word).isdisjoint(":/.~") or Path(word).exists():
        return ""
    near = near_misses(word, list(COMMANDS))
    return near if near.startswith("did you mean") else ""


def _guarded(arguments: list[str]) -> int:
    verbose = "-v" in arguments or "--verbose" in arguments
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Newer releases of typer give back 130 where a command was interrupted, older ones raise.
        code = int(app(arguments, standalone_mode=False) or 0)
        if code == 130:
            raise KeyboardInterrupt
        return code
    except typer.Exit as leave:
        return int(leave.exit_code)
    except _USAGE_ERROR as error:
        _tell(error.format_message())
        return 2
    except (KeyboardInterrupt, typer.Abort):
        hint = "with --resume the same command goes on from here" if arguments[0] == "run" else ""
        _tell("interrupted; nothing was published", hint)
        return 130
    except GraphwrightError as error:
        if verbose:
            _trace()
        _tell(error)
        return error.exit_code
    except ImportError as error:
        if verbose:
            _trace()
        package = (error.name or "").partition(".")[0]
        _tell(Missing(f"{error}: pip install {package}"))
        return 3
    except OSError as error:
        if verbose:
            _trace()
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"{where}{error.strerror or error}")
        return 2
    except Exception as error:
        if verbose:
            _trace()
        kind = type(error).__name__
        hint = "run again with -v for the traceback"
        _tell(f"internal error: {kind}: {error}", hint)
        return 1


def _trace() -> None:
    from ..report.visible import visible

    sys.stderr.write(visible(traceback.format_exc()))


def _tell(error: BaseException | str, hint: str = "") -> None:
    from .terminal import print_error

    print_error(make_console(stderr=True), error, hint)


if __name__ == "__main__":
    main()
