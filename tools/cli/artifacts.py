"""Commands on an artifact: repeat, resize, convert, tell of its search, let it write or rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...ir.core.errors import BadInput
from .options import (
    Json,
    TrustSource,
    Verbose,
    check_choice,
    checked_model,
    make_console,
    print_json,
)


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

    console = make_console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        done = replay.replay(
            artifact, out, steps, force=force, trust_source=trust_source, source=source
        )
    if as_json:
        print_json(done)
    else:
        make_console().print(done["summary"], markup=False, highlight=False, soft_wrap=True)


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

    console = make_console(stderr=True)
    with terminal.Steps(console, silent=as_json) as steps:
        done = resize.resize(artifact, max_bytes, out, steps, force=force)
    if as_json:
        print_json(done.to_json())
    else:
        message = f"{out}: {done.sizes.artifact_bytes} bytes of {done.sizes.whole_bytes}"
        make_console().print(message, markup=False, highlight=False, soft_wrap=True)


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
        print_json(done.search.model_dump(mode="json", exclude_unset=True))
    else:
        front_table.print_front(make_console(), done)


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
        make_console().print(f"{out}: {note}", markup=False, highlight=False, soft_wrap=True)


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="OUT|MODEL", help="An artifact, or a model.", callback=checked_model
        ),
    ],
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
    draft: Annotated[
        str, typer.Option(help="What writes ahead: auto, none, recycle, path, or a path's name.")
    ] = "none",
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is a user's turn: by the chat template.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    verbose: Verbose = False,
) -> None:
    """Continue PROMPT, word by word on stdout; several are read as one batch, an answer a line."""
    from ...backends.generation.sampling import Sampling
    from ..run import generating
    from . import terminal

    check_choice("device", device, ("cpu", "cuda"))
    sampling = Sampling(temperature, top_p, seed, top_k)
    console = make_console(stderr=True)
    with terminal.Steps(console) as steps:
        steps(f"loading {model}", 0, 1)
        writer = generating.Writer(
            model, tokenizer=tokenizer or None, device=device, draft=draft, chat=chat
        )
    if writer.note:
        console.print(f"note: {writer.note}", markup=False, highlight=False)
    answers = writer.write(
        prompts, image or None, sampling, max_new_tokens=max_new_tokens,
        stream=_write_out if len(prompts) == 1 else None,
    )  # fmt: skip
    if len(answers) > 1:
        _write_out(0, "\n".join(answer.text for answer in answers))
    sys.stdout.write("\n")
    for row in answers:
        message = f"{row.prompt_tokens} tokens read, {len(row.ids)} written, ended by {row.ended}"
        console.print(message, markup=False, highlight=False)
    console.print(str(answers[0].speed), markup=False, highlight=False)
    if answers[0].drafting is not None:
        console.print(f"draft: {answers[0].drafting}", markup=False, highlight=False)


def rerank(
    artifact: Annotated[Path, typer.Argument(help="Made with the pass rerank-by-attention.")],
    query: Annotated[str, typer.Option(help="What the documents are to answer.")],
    documents: Annotated[Path, typer.Option(help="A document a line; of a .jsonl its `text`.")],
    tokenizer: Annotated[str, typer.Option(help="Folder with tokenizer.json.")] = "",
    verbose: Verbose = False,
) -> None:
    """Rank documents by how well they answer a query: score, number and text, the best first."""
    from ..report.visible import visible
    from ..run.reranking import Reranker, read_documents

    texts = read_documents(documents)
    for one in Reranker(artifact, tokenizer or None)(query, texts):
        line = visible(" ".join(texts[one.place].split()))
        sys.stdout.write(f"{one.score:.6g}\t{one.place + 1}\t{line}\n")


def _write_out(_: int, text: str) -> None:
    from ..report.visible import visible

    sys.stdout.write(visible(text))
    sys.stdout.flush()
