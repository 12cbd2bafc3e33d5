"""The graph of a GGUF file: transformers' model of its architecture, with the file's weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from ...core.errors import BadInput
from ...core.scratch import Scratch
from ...fx.view import FxView
from ..hf.folder import load_model
from ..hf.model import read_config
from .config import config_of
from .file import read_gguf
from .model import checkpoint_of, write_tokenizer


def load_gguf(
    path: Path, *, name: str | None = None, dtype: torch.dtype | None = None,
    cache: bool | None = None,
) -> FxView:  # fmt: skip
    """The graph, in float32 unless ``dtype`` says otherwise; inputs and outputs as ``load_folder``
    has them. Linears hold the file's codes where a form of ours is equal to them.

    Its config and what transformers makes of its tokenizer lie in a folder of their own, which goes
    with the view. Raises ``BadInput`` where the file is damaged or contradicts itself, and for an
    architecture that is not read.
    """
    file = read_gguf(path)
    settings = config_of(file)
    checkpoint = checkpoint_of(file, settings)
    scratch = Scratch("gguf")
    (scratch.path / "config.json").write_text(json.dumps(settings, indent=1))
    lacking = write_tokenizer(file, scratch.path)
    if lacking:
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, f"no tokenizer: {lacking}"))
    try:
        model = read_config(scratch.path, trust_remote_code=False)
        view = load_model(
            scratch.path, model, checkpoint, name=name or str(path), dtype=dtype, cache=cache,
            read_here=True, files=(path,),
        )  # fmt: skip
    except BadInput as error:
        text = str(error).replace(f"{scratch.path}/config.json", str(path))
        raise BadInput(text.replace(str(scratch.path), str(path))) from None
    view.source.kind, view.source.owner = "gguf", scratch
    return view
