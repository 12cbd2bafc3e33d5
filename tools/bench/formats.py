"""``python -m graphwright.tools.bench.formats [ARTIFACT] --peer-python PYTHON``: in and out.

Without an artifact the table of formats: a small Llama, a Qwen2 with biases and a tied head and a
Gemma; with ``--archs mixtral,qwen2_moe,gpt_oss`` some with experts. *out*: an artifact is
converted, and the format's own library computes its logits; *in*: the library writes a checkpoint,
and what is loaded of it runs in ONNX Runtime against the library's numbers. A cell says ``exact``,
how much rounding there is (relative L2), or why it was refused.

With an artifact it is written in each format, run there, and read back here; one with low-rank
paths is run with its adapter. The libraries get an environment of their own::

    python -m venv PEER
    PEER/bin/pip install "torch>=2.11,<2.14" transformers compressed-tensors peft accelerate \\
        bitsandbytes gguf xllamacpp gptqmodel hqq torchao optimum

llama.cpp rounds the inputs of a quantized linear to 8 bits, and its figure shows that; beside it is
the figure for the same numbers in a file of float32, for which it rounds nothing. Rows of what is
missing there say so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ...backends import compile, export
from ...ir.core.errors import GraphwrightError
from ...ir.load.sources import load
from ...passes.manager import optimize
from ..formats.convert import convert
from . import format_peer, format_writer, gguf_types
from .format_session import Session
from .gpt_oss import save_gpt_oss
from .processes import CommandFailed
from .showing import ended
from .structure_table import print_table

FORMATS = ("compressed-tensors", "gptq", "gguf")
ARCHS = {"llama": "Llama", "qwen2": "Qwen2", "gemma": "Gemma"}
EXPERTS = {"mixtral": "Mixtral", "qwen2_moe": "Qwen2Moe"}
GPT_OSS = {"gpt_oss": {}, "gpt_oss_f32": {"mxfp4": False},
           "gpt_oss_cut": {"truncate": True}}  # fmt: skip
"""Those with layers of experts, in a table of their own."""
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
          "IQ4_NL", "MXFP4", "IQ4_XS")  # fmt: skip
"""Types of GGUF that llama.cpp writes; the last one has no form here."""
FOUR = "quantize{bits=4 group=32 accuracy_level=0}"
OUT = {
    "compressed-tensors": FOUR,
    "compressed-tensors 3 bits": "quantize{bits=3 group=32}",
    "compressed-tensors + EoRA by PEFT": f"{FOUR},eora{{rank=8}}",
    "gptq": FOUR,
    "gptq v2 (asymmetric)": "quantize{bits=4 group=32 accuracy_level=0 symmetric=false}",
    "gguf as it is": "clean{optional=true}",
    "gguf Q4_0": FOUR,
    "gguf Q8_0": "quantize{bits=8 group=32 accuracy_level=0 scales=float16}",
    "gptq of real zero points": "hqq{bits=4 group=32}",
    "gguf of zero points": "quantize{bits=4 group=32 symmetric=false}",
    **dict.fromkeys(("awq", "bitsandbytes", "hqq", "torchao"), FOUR),
}
"""Rows of what is written: the format, more words, and what is made of the model."""
ADAPTED = {"": "adapter{{path={}}}", " as a path": "adapter{{path={} fold=false}}"}
"""What is made of an adapter; DoRA's is folded alone."""
WORDS = 288
EXACT = 1e-6
"""Relative L2 of logits that float32 itself leaves."""
Inputs = dict[str, torch.Tensor]


def table(peer: Session, archs: Sequence[str], rows: Sequence[str]) -> Iterator[list[str]]:
    """Every format in every direction that there is, and a cell for each kind of model."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {arch: small(arch, Path(scratch) / arch) for arch in archs}
        for name, way, cell in _rows(peer):
            if rows and not any(row in name for row in rows):
                continue
            cells = []
            for folder in folders.values():
                with tempfile.TemporaryDirectory(dir=scratch) as place:
                    cells.append(_cell_text(cell, folder, Path(place)))
            yield [name, way, *cells]


Row = tuple[str, str, Callable[[Path, Path], str]]


def _rows(peer: Session) -> list[Row]:
    rows: list[Row] = [
        (name, "out", partial(_written, to=name.split()[0], recipe=recipe, peer=peer))
        for name, recipe in OUT.items()
    ]
    rows += [(f"gguf {kind}", "in", partial(_from_gguf, kind=kind, peer=peer)) for kind in BLOCKS]
    for kind in format_writer.WRITERS:
        rows.append((kind, "in", partial(_from_library, kind=kind, peer=peer)))
    for words, recipe in ADAPTED.items():
        names = [n for n in format_writer.ADAPTERS if not (words and n == "peft-dora")]
        rows += [
            (kind + words, "in", partial(_from_adapter, kind=kind, recipe=recipe, peer=peer))
            for kind in names
        ]
    return rows


def _cell_text(cell: Callable[[Path, Path], str], folder: Path, place: Path) -> str:
    try:
        return cell(folder, place)
    except CommandFailed as error:
        return _failure(error)
    except GraphwrightError as error:
        return f"refused: {str(error).partition(': make')[0]}"


def _failure(error: CommandFailed) -> str:
    """The line of what a command said that tells why it ended."""
    lines = str(error).strip().splitlines()
    reasons = [line for line in lines if "Error" in line or "ASSERT" in line]
    return f"failed there: {(reasons or lines)[-1].strip()}"


def small(arch: str, folder: Path) -> Path:
    """A random model of two blocks: Qwen2 with biases, all but Llama with a tied head."""
    import tokenizers
    import transformers

    words = tokenizers.ByteLevelBPETokenizer()
    # llama.cpp takes no vocabulary without merges.
    words.train_from_iterator([__doc__ or ""], vocab_size=WORDS, special_tokens=["<s>", "</s>"],
                              show_progress=False)  # fmt: skip

    if arch in GPT_OSS:
        save_gpt_oss(folder, words=WORDS, **GPT_OSS[arch])
        return _with_words(folder, words)
    name = (ARCHS | EXPERTS)[arch]
    routed = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
              "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vocab_size=WORDS, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=arch not in ("llama", *EXPERTS), pad_token_id=1,
        **({"head_dim": 64} if arch == "gemma" else routed if arch in EXPERTS else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return _with_words(folder, words)


def _with_words(folder: Path, words: Any) -> Path:
    import transformers

    words.save(str(folder / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _inputs() -> Inputs:
    ids = torch.arange(1, format_peer.COUNT + 1)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _logits(model: Any) -> np.ndarray:
    return np.asarray(compile(model)(**_inputs())["logits"].float().numpy())


def _written(folder: Path, place: Path, to: str, recipe: str, peer: Session) -> str:
    """An artifact of ``recipe`` as ``to``, in its library."""
    samples = [_inputs()] if "eora" in recipe else None
    result = optimize(load(folder), recipe, samples=samples, calibration=samples)
    artifact = export(result.graph, place / "artifact", report=result.report)
    own = _logits(artifact)
    convert(artifact, to, place / "made")
    adapter = place / "made" / "adapter"
    return _there(own, place / "made", adapter if adapter.is_dir() else None, peer)


def _from_library(folder: Path, place: Path, kind: str, peer: Session) -> str:
    """What a library has written, read here."""
    _run(peer, format_writer.__file__, folder, place / "made", kind)
    expected = np.load(place / "made.npy")
    return _words(_error(expected, _logits(load(place / "made", dtype=torch.float32, cache=False))))


def _from_adapter(folder: Path, place: Path, kind: str, recipe: str, peer: Session) -> str:
    """An adapter that PEFT has written, added here to the model of its folder."""
    _run(peer, format_writer.__file__, folder, place / "made", kind)
    graph = optimize(load(folder, cache=False), recipe.format(place / "made")).graph
    return _words(_error(np.load(place / "made.npy"), _logits(graph)))


def _from_gguf(folder: Path, place: Path, kind: str, peer: Session) -> str:
    """A file of these blocks, read here, against transformers and llama.cpp."""
    result = optimize(load(folder), "clean")
    convert(export(result.graph, place / "artifact", report=result.report), "gguf", place / "whole")
    (place / "made").mkdir()
    path = place / "made" / "model.gguf"
    _run(peer, gguf_types.__file__, place / "whole" / "model.gguf", path, kind)
    return _there(_logits(load(path, cache=False)), path.parent, None, peer)


def measured(artifact: Path, peer: Session, formats: Sequence[str]) -> Table:
    """A row a format: relative L2 of its logits to the artifact's, read back here and there."""
    own = _logits(artifact)
    table = Table(title=str(artifact), title_justify="left")
    for name in ("format", "read back here", "its own library"):
        table.add_column(name)
    for name in formats:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            convert(artifact, name, folder)
            adapter = folder / "adapter" if (folder / "adapter").is_dir() else None
            here = "with the adapter, not read here"
            if adapter is None:
                source = folder / "model.gguf" if name == "gguf" else folder
                here = _words(_error(own, _logits(load(source, dtype=torch.float32))))
            try:
                there = _there(own, folder, adapter, peer)
            except CommandFailed as error:
                there = _failure(error)
            table.add_row(name, here, there)
    return table


def _there(own: np.ndarray, folder: Path, adapter: Path | None, peer: Session) -> str:
    out = folder.with_suffix(".npy")
    _run(peer, format_peer.__file__, folder, out, *([] if adapter is None else [adapter]))
    distances = ""
    expected = torch.log_softmax(torch.from_numpy(own[0, -1]), -1).numpy()
    for name, words in (("llama", "llama.cpp"), ("whole", "in float32 files")):
        path = out.with_suffix(f".{name}.npy")
        if path.is_file():
            logprobs = np.load(path)
            gap = np.abs(logprobs - expected[: len(logprobs)])
            distances += f"; {words} {gap.mean():.1e}, at most {gap.max():.1e}"
    whole = _words(_error(own, np.load(out))) if out.is_file() else "not read by transformers"
    return f"{whole}{distances}"


def _run(peer: Session, script: str, *arguments: object) -> None:
    failure = peer.run(script, *arguments)
    if failure:
        raise CommandFailed(failure)


def _words(error: float) -> str:
    return "exact" if error <= EXACT else f"rounding {error:.1e}"


def _error(own: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(other - own) / np.linalg.norm(own))


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, run and print the table."""
    parser = argparse.ArgumentParser(
        prog="formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, nargs="?", metavar="ARTIFACT")
    parser.add_argument("--peer-python", required=True, help="of the libraries' environment")
    parser.add_argument("--formats", default="", help="a,b: of the artifact, or rows of the table")
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--markdown", action="store_true", help="the table as FORMATS.md has it")
    options = parser.parse_args(arguments)
    chosen, archs = [name for name in options.formats.split(",") if name], options.archs.split(",")

    def show(console: Console) -> None:
        with closing(Session(options.peer_python)) as peer:
            if options.artifact is None:
                columns = ("format", "direction", *archs)
                rows = table(peer, archs, chosen)
                print_table(columns, rows, console, markdown=options.markdown)
            else:
                console.print(measured(options.artifact, peer, chosen or FORMATS))

    return ended(show)


if __name__ == "__main__":
    raise SystemExit(main())
