"""``optimize-model``: the command line. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...ir.core.errors import BadInput, GraphwrightError, Missing, near_misses
from ...ir.core.heap import uncollected
from ...ir.core.version import __version__
from . import threads

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip

_USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
"""``ClickException``, of click or of the copy of click that newer releases of typer carry."""

COMMANDS = (
    "run", "passes", "recipes", "inspect", "bench", "eval", "diff", "explain", "replay", "resize",
    "generate", "convert", "compare-tokens", "front",
)  # fmt: skip
MODEL_HELP = (
    "zoo:NAME, a Hugging Face folder or id, FILE.onnx, FILE.pt2, FILE.gguf, or "
    "package.module:factory"
)
LIST_TASKS = "list"
"""What ``eval --tasks`` stands for where no task is named."""
DEFAULT_RECIPE = "w8"
"""The recipe where none is given: it cuts linears to about a quarter at the smallest error."""

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print the manifest, and only it, on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show tracebacks.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let a hub model run its code.")]
TrustSource = Annotated[
    bool,
    typer.Option("--trust-source", help="Load what the manifest names, though that runs code."),
]


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


@app.command()
def run(
    model: Model,
    recipe: Annotated[
        str, typer.Option("-r", "--recipe", help="A recipe's name, or a TOML or YAML file.")
    ] = "",
    passes: Annotated[str, typer.Option("-p", "--passes", help="Passes, as text.")] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", "--output", help="Artifact folder.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Runtime that checks the artifact.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    target: Annotated[
        str, typer.Option(help="What it is written for: cpu, cuda, or portable (standard ONNX).")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Float to load MODEL in: fp32, fp16 or bf16; default: its own.")
    ] = "",
    max_error: Annotated[
        float | None, typer.Option(help="Bound on relative L2 of any output.")
    ] = None,
    calib: Annotated[
        str, typer.Option(metavar="DATA", help="Data for passes that learn: a file or zoo:NAME.")
    ] = "",
    calib_samples: Annotated[int | None, typer.Option(help="Most samples; 128.")] = None,
    original: Annotated[
        str, typer.Option(metavar="MODEL", help="What a quantized MODEL was made from, for eora.")
    ] = "",
    calib_length: Annotated[int | None, typer.Option(help="Tokens of a text; 512.")] = None,
    budget: Annotated[
        str,
        typer.Option(help="Search a recipe: bytes=25%,loss=1%; bytes of weights."),
    ] = "",
    using: Annotated[str, typer.Option(help="Knobs of the search: tokens,layers,bits,rank.")] = "",
    tasks: Annotated[
        str, typer.Option("--eval", metavar="TASKS", help="Judge source and artifact: a,b.")
    ] = "",
    cache: Annotated[
        bool | None,
        typer.Option("--cache/--no-cache", help="Key-value cache; default: if MODEL writes text."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast; read no weight.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a foreign folder.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
    trust_remote_code: Trust = False,
) -> None:
    """Optimize MODEL and write the artifact to OUT."""
    from . import front_table, terminal

    console = _console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        steps("starting", 0, 1)
        with uncollected():
            from ...ir.load.sources import form_of
            from ...ir.vocab.targets import TARGETS

            asked, knobs = _budget(budget, using, given=recipe or passes)
            # Of a name that is not a model's, only that is said.
            silent = as_json or bool(budget) or not form_of(model)
            chosen = _choose_recipe(recipe, passes, console, quiet=silent)
            from ..run import pipeline

        _check_backend(backend)
        _check_choice("device", device, ("cpu", "cuda"))
        _check_choice("target", target, tuple(TARGETS))
        if dtype:
            _check_choice("dtype", dtype, tuple(pipeline.FLOATS))
        if max_error is not None and not max_error > 0:
            raise BadInput(f"--max-error {max_error} must be above 0")
        request = pipeline.Request(
            model, chosen, out, max_error=max_error, device=device, force=force,
            trust_remote_code=trust_remote_code, eval_tasks=_tasks(tasks), calibration=calib,
            calibration_samples=calib_samples, calibration_length=calib_length, cache=cache,
            backend=backend, resume=resume, target=target, original=original, budget=asked,
            using=knobs, dtype=dtype,
        )  # fmt: skip
        if dry_run and asked is not None:
            done = pipeline.dry_search(request, steps)
        else:
            done = pipeline.dry_run(request) if dry_run else pipeline.run(request, steps)
    if as_json:
        _print_json(done.to_json())
    elif dry_run:
        terminal.print_plan(_console(), done)
    else:
        terminal.print_result(_console(), done, str(out) if out is not None else "")
    if not as_json and done.search is not None:
        front_table.print_front(_console(), done)


@app.command()
def passes(name: Annotated[str, typer.Argument(metavar="[NAME]")] = "") -> None:
    """List the passes, or describe one with its options."""
    from . import listing

    console = _console()
    if name:
        listing.print_pass(console, name)
    else:
        listing.print_passes(console)


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    from . import listing

    listing.print_recipes(_console())


@app.command()
def inspect(
    model: Model,
    text: Annotated[bool, typer.Option("--text", help="Print the graph as text.")] = False,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Tails of activations, dormant heads, forecasts.")
    ] = False,
    calib: Annotated[str, typer.Option("--calib", help="Data for --outliers.")] = "",
    calib_samples: Annotated[int | None, typer.Option("--calib-samples")] = None,
    bits: Annotated[int, typer.Option("--bits", min=2, max=8, help="Of the forecast.")] = 4,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Show what is recognised in MODEL: blocks, linears, attention sites."""
    if outliers or calib:
        from . import outlook

        if not outliers or not calib:
            raise BadInput("--outliers needs --calib DATA, and --calib is for --outliers")
        outlook.print_outliers(
            _console(), model, calib, samples=calib_samples, bits=bits, trust=trust_remote_code
        )
        return
    from . import listing

    listing.print_structure(_console(), model, text=text, trust_remote_code=trust_remote_code)


@app.command()
def explain(
    model: Model,
    passes: Annotated[str, typer.Option("-p", "--passes", help="Passes, as text.")] = "",
    recipe: Annotated[str, typer.Option("-r", "--recipe")] = "",
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Say what the passes would do to MODEL, at which sites, and why not at the others."""
    with uncollected():
        from ..run import pipeline
    from . import terminal

    console = _console(stderr=True)
    chosen = _choose_recipe(recipe, passes, console, quiet=False)
    request = pipeline.Request(model, chosen, None, trust_remote_code=trust_remote_code)
    done = pipeline.dry_run(request)
    terminal.print_plan(_console(), done)


@app.command()
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
        _print_json([row._asdict() for row in rows])
    else:
        terminal.print_diff(_console(), rows, str(a), str(b))


@app.command()
def replay(
    artifact: Path,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", "--output", help="Where to write it.")
    ] = None,
    source: Annotated[
        str, typer.Option(metavar="MODEL", help="Where its model lies now, if it was moved.")
    ] = "",
    force: Annotated[bool, typer.Option("--force")] = False,
    trust_source: TrustSource = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Repeat the run that made ARTIFACT and say whether the weights come out byte-identical."""
    from ..run import replay
    from . import terminal

    console = _console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        done = replay.replay(
            artifact, out, steps, force=force, trust_source=trust_source, source=source
        )
    if as_json:
        _print_json(done)
    else:
        _console().print(done["summary"], markup=False, highlight=False, soft_wrap=True)


@app.command()
def resize(
    artifact: Path,
    max_bytes: Annotated[int, typer.Option("--max-bytes", help="Of model.onnx and its data.")],
    out: Annotated[Path, typer.Option("-o", "--out", "--output", help="Where to write it.")],
    force: Annotated[bool, typer.Option("--force")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the largest size of ARTIFACT that fits; it was made by a recipe with bitstack."""
    from ..run import resize
    from . import terminal

    console = _console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        done = resize.resize(artifact, max_bytes, out, steps, force=force)
    if as_json:
        _print_json(done.to_json())
    else:
        said = f"{out}: {done.sizes.artifact_bytes} bytes of {done.sizes.whole_bytes}"
        _console().print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
def front(artifact: Path, as_json: Json = False, verbose: Verbose = False) -> None:
    """Show what the search behind ARTIFACT found: sizes and losses, and what a megabyte buys."""
    from ..report import manifest
    from . import front_table

    done = manifest.load(artifact)
    if done.search is None:
        raise BadInput(
            f"{artifact}: its recipe was given, not searched for: there is no front. Make it with "
            "--budget, such as --budget bytes=25%"
        )
    if as_json:
        _print_json(done.search.model_dump(mode="json", exclude_unset=True))
    else:
        front_table.print_front(_console(), done)


@app.command()
def convert(
    artifact: Path,
    to: Annotated[
        str,
        typer.Option("--to", help="compressed-tensors, gptq, gguf, peft or transformers.js."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", "--output", help="A new folder.")],
    verbose: Verbose = False,
) -> None:
    """Write ARTIFACT in another tool's format, with the same numbers."""
    from ..formats.convert import convert

    for note in convert(artifact, to, out):
        _console().print(f"{out}: {note}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="OUT|MODEL", help="An artifact, or a model.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue.")],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image that the prompt is about; one a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, always.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest, of this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many of the likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    verbose: Verbose = False,
) -> None:
    """Continue PROMPT, word by word on stdout; several are read as one batch, an answer a line."""
    from ...backends.sampling import Sampling
    from ..run import generating
    from . import terminal

    _check_choice("device", device, ("cpu", "cuda"))
    sampling = Sampling(temperature, top_p, seed, top_k)
    console = _console(stderr=True)
    with terminal.Steps(console) as steps:
        steps(f"loading {model}", 0, 1)
        writer = generating.Writer(model, tokenizer=tokenizer or None, device=device)
    if writer.note:
        console.print(f"note: {writer.note}", markup=False, highlight=False)
    made = writer.write(
        prompts, image or None, sampling, max_new_tokens=max_new_tokens,
        stream=_write_out if len(prompts) == 1 else None,
    )  # fmt: skip
    if len(made) > 1:
        _write_out(0, "\n".join(answer.text for answer in made))
    sys.stdout.write("\n")
    for row in made:
        said = f"{row.prompt_tokens} tokens read, {len(row.ids)} written, ended by {row.ended}"
        console.print(said, markup=False, highlight=False)
    console.print(str(made[0].speed), markup=False, highlight=False)


def _write_out(_: int, text: str) -> None:
    from ..report.visible import visible

    sys.stdout.write(visible(text))
    sys.stdout.flush()


@app.command()
def bench(
    artifacts: Annotated[list[Path] | None, typer.Argument(metavar="OUT...")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,32",
    length: Annotated[int, typer.Option(help="Sequence length.")] = 128,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 7,
    trust_source: TrustSource = False,
    verbose: Verbose = False,
) -> None:
    """Time artifacts side by side with their source model; ratios, in one run."""
    from . import benchmark

    if not artifacts:
        raise BadInput("name at least one artifact folder")
    sizes = _integers("--batches", batches)
    benchmark.main(
        artifacts, sizes, length, device=device, repeats=repeats, trust_source=trust_source
    )


@app.command("eval")
def evaluate(
    subjects: Annotated[list[str] | None, typer.Argument(metavar="OUT|MODEL...")] = None,
    tasks: Annotated[
        str, typer.Option(help="Tasks: a,b; by itself lists them. Default: by the model's kind.")
    ] = "",
    reference: Annotated[str, typer.Option(help="The original; default: the first one.")] = "",
    samples: Annotated[int | None, typer.Option(help="Samples, in each task's unit.")] = None,
    data: Annotated[Path | None, typer.Option(help="Text, lines, inputs: see --tasks.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json.")] = "",
    window: Annotated[int | None, typer.Option(help="Tokens in a window of text.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows.")] = None,
    batch: Annotated[int, typer.Option(help="Batch of latency and memory.")] = 1,
    length: Annotated[int | None, typer.Option(help="Length of latency and memory.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of latency.")] = 15,
    interval: Annotated[
        float | None, typer.Option(help="Widest half-width of a 95 % interval that will do.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and intervals.")] = 0,
    backend: Annotated[str, typer.Option(help="Where all of them run.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="SVG of the Pareto plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data only, on stdout.")] = False,
    verbose: Verbose = False,
    trust_remote_code: Trust = False,
) -> None:
    """Judge artifacts and models side by side: quality, latency, memory, with 95 % intervals.

    With several, a Pareto plot is written (eval.svg; with --json only where --plot asks for it),
    and the comparison into the report of each artifact.
    """
    if tasks == LIST_TASKS:
        from . import listing

        listing.print_tasks(_console())
        return
    from ...backends import backend_names
    from ..evaluate import Setting, too_wide
    from ..run import evaluation
    from . import terminal

    _check_choice("backend", backend, backend_names())
    _check_choice("device", device, ("cpu", "cuda"))
    if interval is not None and not interval > 0:
        raise BadInput(f"--interval {interval} must be above 0")
    with terminal.Steps(_console(stderr=True), silent=as_json) as steps:
        setting = Setting(
            samples=samples, data=data, window=window, stride=stride, batch=batch, length=length,
            rounds=rounds, seed=seed, progress=steps,
        )  # fmt: skip
        judged, found, original = evaluation.judge(
            subjects or [], tasks, reference, setting, tokenizer=tokenizer, backend=backend,
            device=device, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    rows = evaluation.rows_of(judged, found)
    target = plot if plot is not None or as_json else evaluation.DEFAULT_PLOT
    written, failed = evaluation.publish(rows, original.name, target)
    if as_json:
        _print_json(evaluation.to_json(rows, original.name, setting))
    else:
        terminal.print_eval(_console(), rows, original.name)
        terminal.print_written(_console(stderr=True), written, failed)
    wide = [] if interval is None else too_wide(judged, found, interval)
    if wide:
        raise BadInput("\n".join(wide))


@app.command("compare-tokens")
def compare_tokens(
    model: Model,
    calib: Annotated[str, typer.Option(metavar="DATA", help="Prompts to compare on.")],
    keep: Annotated[str, typer.Option(help="Shares of image tokens.")] = "50%,25%,12%",
    task: Annotated[str, typer.Option("--eval", help="vqa: judge by right answers.")] = "",
    samples: Annotated[int | None, typer.Option(help="Prompts, or questions of vqa.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of a prompt.")] = 7,
    picture: Annotated[
        Path | None, typer.Option(help="SVG of one image with the tokens kept by each method.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print data only, on stdout.")] = False,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Compare the methods that prune image tokens and fit MODEL: quality, cost, measured prefill.

    Quality is how often the next token is the source's, or with --eval vqa the share of right
    answers, beside what the model says without the image.
    """
    from ..run import comparing_tokens
    from . import terminal, token_table

    if task not in ("", "vqa"):
        raise BadInput(f"--eval {task} is unknown here; vqa is what image tokens are judged by")
    with terminal.Steps(_console(stderr=True), silent=as_json) as steps:
        found = comparing_tokens.compare(
            model, calib, [part.strip() for part in keep.split(",")], vqa=bool(task),
            samples=samples, rounds=rounds, progress=steps, trust_remote_code=trust_remote_code,
            picture=picture,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        token_table.print_compared(_console(), found)


def _budget(text: str, using: str, *, given: str) -> tuple[Any, tuple[str, ...]]:
    """The budget, if any, and the knobs. Raises ``BadInput`` where a recipe is given too."""
    from ..search.budget import Budget
    from ..search.search import KNOBS

    if using and not text:
        raise BadInput("--using names the knobs of a search: give --budget too")
    if text and given:
        raise BadInput("--budget searches for a recipe: give it, or a recipe by -r or -p, not both")
    knobs = tuple(part.strip() for part in using.split(",")) if using else KNOBS
    return (Budget.parse(text) if text else None), knobs


def _tasks(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    from ..evaluate import task_names

    return tuple(task_names(text))


def _choose_recipe(name: str, text: str, console: Console, *, quiet: bool) -> Any:
    from ...passes.recipe import Recipe, recipe_summary

    if name and text:
        raise BadInput("give either -r or -p, not both")
    if text:
        return Recipe.parse(text)
    if name:
        return Recipe.load(name)
    chosen = Recipe.load(DEFAULT_RECIPE)
    if not quiet:
        summary = recipe_summary(DEFAULT_RECIPE)
        console.print(f"No recipe given: using {DEFAULT_RECIPE} ({chosen}). {summary}",
                      markup=False, highlight=False)  # fmt: skip
    return chosen


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadInput(f"--{option} {value} is unknown; {near_misses(value, known)}")


def _check_backend(name: str) -> None:
    """Refuse a backend that is not there, and the one that the others are held against."""
    from ...backends import backend_names, find_backend

    _check_choice("backend", name, backend_names())
    if find_backend(name).is_reference:
        raise BadInput(
            f"--backend {name}: it is what the artifact is compared with; name another one"
        )


def _integers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{option} {text!r} must be numbers separated by commas") from None
    if min(numbers) < 1:
        raise BadInput(f"{option} {text!r} must be above 0")
    return numbers


def _console(*, stderr: bool = False) -> Console:
    # Loaded late, as all that a command needs: help comes at once.
    from .terminal import VisibleConsole

    return VisibleConsole(stderr=stderr)


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: runs a command and exits with the contract's code (0, 1, 2, 3 or 130)."""
    threads.share_the_cores()
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if arguments[0] == "eval" and arguments[-1] == "--tasks":
        arguments.append(LIST_TASKS)
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
    near = near_misses(word, COMMANDS)
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

    print_error(_console(stderr=True), error, hint)


if __name__ == "__main__":
    main()
