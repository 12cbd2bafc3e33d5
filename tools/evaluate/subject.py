"""What is judged: a graph, a compiled executable, an artifact or a model, behind one callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ...backends import Executable, find_backend
from ...backends import compile as compile_model
from ...backends.artifacts import artifact
from ...backends.onnx.lowering import lowered
from ...backends.onnx.model_files import MANIFEST_FILE, MODEL_FILE, write_model
from ...ir.core.errors import BadInput, Missing
from ...ir.core.scratch import Scratch
from ...ir.core.view import View
from ...ir.load.intact import check_files
from ...ir.load.side_files import longest_text, read_json
from ...ir.load.sources import load
from ...ir.load.zoo.text import read_tokenizer
from ...ir.run.inputs import sample_inputs
from ...ir.structure.cache_slots import (
    GLOBAL_MASK,
    POSITIONS,
    RELEVANCE,
    TOKEN_TYPES,
    is_state,
    past_slot,
)
from ...ir.structure.costs import weight_bytes
from ..report import manifest

TEXT, IMAGE_TEXT = "text-generation", "image-text-to-text"
IMAGE, EMBEDDING = "image-classification", "text-embedding"
TEXT_CLASSES, TOKEN_CLASSES = "text-classification", "token-classification"
ANSWERS, SPEECH = "question-answering", "automatic-speech-recognition"
KINDS = (TEXT, IMAGE_TEXT, IMAGE, EMBEDDING, TEXT_CLASSES, TOKEN_CLASSES, ANSWERS, SPEECH)
READERS = (TEXT_CLASSES, TOKEN_CLASSES, ANSWERS)
"""The kinds that read a text and give classes: of it, of its tokens, or of where an answer is."""
SOUNDS = ("input_values", "input_features")
"""Inputs that are sound, as it is and as features."""
DEFAULT_TOKENS = 512
"""Longest input of a model whose config does not say."""


class Subject:
    """A thing to judge. ``run`` takes inputs by name and gives outputs by name, floats as float32.

    ``kind`` is one of ``KINDS``, or empty where it is not known; ``folder`` holds the tokenizer;
    ``bytes`` is the weights' size on disk, of a graph in memory the size of its weights. A graph is
    compiled at the first run, so that what does not fit is refused before.
    """

    def __init__(
        self, executable: Executable | Callable[[], Executable], *, name: str, kind: str = "",
        folder: Path | None = None, view: View | None = None, size: int | None = None,
        stored: tuple[str, str] | None = None, backend: str = "",
    ) -> None:  # fmt: skip
        self._executable = executable
        self.name, self.folder, self.view, self.bytes = name, folder, view, size
        self.stored, self.backend = stored, backend
        named: Any = executable if view is None else view
        self.input_names, self.output_names = _names(named, "input"), _names(named, "output")
        self.kind = kind if kind in KINDS else _kind(kind, folder, self)
        self._dtypes = _dtypes(view)
        self._scratch: Scratch | None = None

    @classmethod
    def of(
        cls, thing: View | Executable | str | Path | Subject, *, name: str = "",
        tokenizer: str | Path | None = None, backend: str | None = None, device: str = "cpu",
        trust_remote_code: bool = False, kind: str = "",
    ) -> Subject:  # fmt: skip
        """The subject of a graph, an executable, an artifact folder or a model by name.

        Artifacts and ``.onnx`` files run in ONNX Runtime, everything else eagerly, unless
        ``backend`` says otherwise. ``tokenizer`` is a folder with ``tokenizer.json``, the model's
        own where it is not given. Raises ``BadInput`` and ``Missing`` as ``load`` and ``compile``.
        """
        if isinstance(thing, Subject):
            return thing
        folder = None if tokenizer is None else _tokenizer_folder(Path(tokenizer))
        if isinstance(thing, str | Path):
            return _stored(cls, str(thing), name, folder, backend, device, trust_remote_code, kind)
        if isinstance(thing, View):
            return _in_memory(cls, thing, name, folder, backend or "eager", device, kind)
        if backend is not None:
            raise BadInput("a compiled executable has its backend already: leave out backend=")
        word = type(thing).__name__
        return cls(thing, name=name or word, kind=kind, folder=folder, backend=word)

    @cached_property
    def executable(self) -> Executable:
        """What runs it, compiled when it is asked for."""
        model: Any = self._executable
        return model if hasattr(model, "input_names") else model()  # type: ignore[no-any-return]

    @property
    def head_tokens(self) -> tuple[int, ...]:
        """The tokens that the columns of ``logits`` stand for, where these are some of all."""
        return tuple(getattr(self.executable, "head_tokens", ()))

    def columns(self, tokens: Sequence[int]) -> list[int]:
        """Where in ``logits`` each of these tokens stands. Raises ``BadInput`` for one that the
        head does not say."""
        heads = self.head_tokens
        if not heads:
            return list(tokens)
        places = {token: place for place, token in enumerate(heads)}
        absent = next((token for token in tokens if token not in places), None)
        if absent is not None:
            raise BadInput(
                f"{self.name} says {len(heads)} tokens, and the data needs the token {absent} too: "
                "name it in restrict-head{tokens=[...]}, or judge by data of these tokens alone"
            )
        return [places[token] for token in tokens]

    def run(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name. Inputs that the graph does not take are left out; floats, and masks of
        another integer type, are cast to what it declares. Raises ``BadInput`` where one lacks."""
        absent = [n for n in self.input_names if n not in batch]
        implied = (POSITIONS, TOKEN_TYPES, GLOBAL_MASK, RELEVANCE)
        lacking = [n for n in absent if n not in implied and not is_state(n)]
        if lacking:
            raise BadInput(
                f"{self.name} needs the inputs {', '.join(lacking)}, which evaluation does not "
                f"give; it gives {', '.join(batch)}"
            )
        inputs = {
            n: batch[n].to(self._dtypes.get(n, batch[n].dtype))
            for n in self.input_names if n not in absent
        }  # fmt: skip
        outputs = self.executable(**inputs)
        return {n: v.float().cpu() if v.is_floating_point() else v for n, v in outputs.items()}

    def example(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Random inputs of this batch size and length, for timing. Raises ``BadInput`` where the
        inputs' types are not known."""
        if self.view is not None:
            sizes: dict[str, int] = {}
            for name, value in zip(self.input_names, self.view.inputs(), strict=True):
                for position, dim in enumerate(self.view.type(value).shape or ()):
                    if isinstance(dim, str) and dim.isidentifier() and past_slot(name) is None:
                        sizes.setdefault(dim, batch if position == 0 else length)
            return sample_inputs(self.view, sizes=sizes)
        tokens = {"input_ids", "attention_mask"}
        if not set(self.input_names) <= tokens:
            raise BadInput(
                f"{self.name}: the shapes of an executable's inputs are not known; give the graph "
                "or the artifact's folder"
            )
        ones = torch.ones(batch, length, dtype=torch.int64)
        return {name: ones.clone() for name in self.input_names}

    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer``. ``Missing`` where it or the package is not there."""
        tokenizer: Any = read_tokenizer(self.tokenizer_file().parent)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def tokenizer_file(self) -> Path:
        """Path of ``tokenizer.json``. ``Missing`` where there is none."""
        if self.folder is not None and (self.folder / "tokenizer.json").is_file():
            return self.folder / "tokenizer.json"
        where = f"in {self.folder}" if self.folder is not None else "with the model"
        raise Missing(
            f"{self.name}: no tokenizer.json {where}: give the folder that has it with --tokenizer "
            "FOLDER (tokenizer= in Python). AutoTokenizer.from_pretrained(MODEL).save_pretrained("
            "FOLDER) writes one"
        )

    @property
    def max_tokens(self) -> int:
        """The longest input in tokens that the model's config allows; 512 where it is silent."""
        return longest_text(self.folder) or DEFAULT_TOKENS

    def describe(self) -> str:
        """The name and the kind, as an error says them."""
        inputs, outputs = ", ".join(self.input_names), ", ".join(self.output_names)
        return f"{self.name} ({self.kind or 'of unknown kind'}: {inputs} -> {outputs})"

    def on_disk(self) -> tuple[str, str] | None:
        """(backend, path or name) by which another process can load it; ``None`` for an executable.

        A graph in memory is written out for it, and lives as long as the subject.
        """
        if self.stored is None and self.view is not None:
            self._scratch = Scratch("eval")
            write_model(lowered(self.view).model, self._scratch.path)
            self.stored = ("onnxruntime", str(self._scratch.path / MODEL_FILE))
        return self.stored


def _stored(
    cls: type[Subject], text: str, name: str, folder: Path | None, backend: str | None,
    device: str, trust: bool, kind: str,
) -> Subject:  # fmt: skip
    path = Path(text).expanduser()
    ours = path.is_dir() and (path / MANIFEST_FILE).is_file()
    file = path / MODEL_FILE if ours else path
    if not ours and (path.suffix != ".onnx" or path.is_dir()):
        view = load(text, trust_remote_code=trust, cache=False)
        if backend in (None, "eager"):
            subject = _in_memory(cls, view, name or text, folder, "eager", device, kind)
            subject.stored = ("eager", text)
            return subject
        return _in_memory(cls, view, name or text, folder, str(backend), device, kind)
    if ours and not kind:
        kind = manifest.load(path).source.task
    if ours:
        check_files(path, whole=True)
    view = load(file)
    chosen = backend or "onnxruntime"
    what = file if find_backend(chosen).runs_artifacts else view
    size = artifact.model_bytes(path) if ours else view.source.source_bytes
    return cls(partial(compile_model, what, backend=chosen, device=device),
               name=name or text, kind=kind, folder=folder or file.parent, view=view,
               size=size, stored=(chosen, str(file)), backend=chosen)  # fmt: skip


def _in_memory(
    cls: type[Subject], view: View, name: str, folder: Path | None, backend: str, device: str,
    kind: str,
) -> Subject:  # fmt: skip
    own = Path(view.source.folder) if view.source.folder else None
    return cls(
        partial(compile_model, view, backend=backend, device=device),
        name=name or view.source.name or "graph", kind=kind or view.source.task,
        folder=folder or own, view=view, size=weight_bytes(view), backend=backend,
    )  # fmt: skip


def _names(thing: Any, kind: str) -> tuple[str, ...]:
    """Names of the inputs or outputs: of a graph by a method, of an executable by a property."""
    names = getattr(thing, f"{kind}_names")
    return tuple(names() if callable(names) else names)


def _tokenizer_folder(path: Path) -> Path:
    path = path.parent if path.name == "tokenizer.json" else path
    if not (path / "tokenizer.json").is_file():
        raise Missing(f"{path}: holds no tokenizer.json")
    return path


def _dtypes(view: View | None) -> dict[str, torch.dtype]:
    if view is None:
        return {}
    pairs = zip(view.input_names(), view.inputs(), strict=True)
    types = {name: view.type(value).dtype for name, value in pairs}
    return {name: dtype for name, dtype in types.items() if dtype is not None}


def _kind(word: str, folder: Path | None, subject: Subject) -> str:
    """The kind by the config's architecture, else by the names of inputs and outputs."""
    inputs, outputs = set(subject.input_names), set(subject.output_names)
    config = read_json(folder, "config.json")
    named = config.get("architectures")
    classes = "".join(map(str, named)) if isinstance(named, list) else ""
    texts = word == "causal-lm" or not classes or "CausalLM" in classes or "LMHead" in classes
    if {"input_ids", "pixel_values"} <= inputs:
        return IMAGE_TEXT if "logits" in outputs else ""
    if "pixel_values" in inputs:
        return IMAGE if "logits" in outputs else ""
    if "input_ids" not in inputs:
        heard = "CTC" in classes or "decoder_input_ids" in inputs
        sounds = not inputs.isdisjoint(SOUNDS) and "logits" in outputs
        return SPEECH if sounds and heard else ""
    if {"start_logits", "end_logits"} <= outputs:
        return ANSWERS
    if "logits" in outputs:
        return _kind_of_logits(subject, texts)
    return EMBEDDING if outputs & {"sentence_embedding", "last_hidden_state"} else ""


def _kind_of_logits(subject: Subject, texts: bool) -> str:
    """By their shape, which an executable does not tell: one row of classes for a text is a class
    of it; one for each token is a class of that, where it is not a next token."""
    rank = None
    if subject.view is not None:
        values = dict(zip(subject.output_names, subject.view.outputs(), strict=True))
        rank = subject.view.type(values["logits"]).rank
    if rank == 2:
        return TEXT_CLASSES
    if texts:
        return TEXT
    return TOKEN_CLASSES if rank == 3 else ""
