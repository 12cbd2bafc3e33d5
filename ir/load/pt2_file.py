"""``.pt2`` archives of ``torch.export.save``, opened only where nothing in them can run code.

``torch.export.load`` unpickles what an archive says is pickled, evaluates its dimension
expressions and guards as Python, imports modules that its tree specs name, and loads shared
libraries. So the archive is read first: every string in it must be a plain name, an operator, a
dimension expression of known functions, or a tree spec of plain containers, and no tensor may be
pickled. What is left for torch is data.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.errors import BadInput, Missing, first_line
from ..core.files import open_regular
from ..core.quiet import quiet
from ..core.view import Source
from ..fx.view import FxView
from .pt2_records import check_tensors, record_sizes
from .tracing.dynamic_dims import dim_names
from .tracing.functional import functional
from .tracing.original import ProgramOriginal, traced_call
from .tracing.trace_refusals import refuse_randomness

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_NAME = re.compile(r"[\w.]*")
_OPERATOR = re.compile(
    r"torch\.ops\.([a-z]\w*)\.(\w+)\.(\w+)|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt|pow)"
    r"|_operator\.(getitem|add|sub|mul|mod|floordiv|truediv|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
)
_FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Max|Min|Add|Mul|Pow|Mod|Abs|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not"
    r"|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift"
    r"|RShift|PowByNatural|FloatPow|FloatTrueDiv|IntTrueDiv|ToFloat|TruncToInt|TruncToFloat"
    r"|RoundToInt|RoundDecimal|Identity|IsNonOverlappingAndDenseIndicator|floor|ceiling"
)
_EXPRESSION = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.BinOp,
    ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)
_DEEPEST = 100
"""Levels of the description; torch writes about twenty."""
_FREE_TEXT = ("metadata", "torch_version", "as_string")
"""Fields whose strings torch keeps as strings."""


def load_pt2(path: Path) -> FxView:
    """The graph of a ``.pt2`` file, decomposed to a functional one; its weights are in memory.

    Raises ``Missing`` for an absent file, ``BadInput`` for one that is damaged, that was saved by
    an incompatible torch, or that holds anything that could run code.
    """
    if not path.exists():
        raise Missing(f"{path}: no such file")
    open_regular(path).close()
    if path.stat().st_size == 0:
        raise BadInput(f"{path}: the file is empty")
    _inspect(path)
    program = _load(path)
    original = ProgramOriginal(
        f"the exported program in torch {torch.__version__}", lambda: _load_module(path),
        traced_call(program),
    )  # fmt: skip
    # The guards are Python source; the graph does not need them.
    program._guards_code = []
    with quiet(), torch.no_grad():
        try:
            program = functional(program)
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise BadInput(f"{path}: torch cannot decompose this program: {reason}") from error
    refuse_randomness(program)
    source = Source(
        kind="pt2",
        name=str(path),
        folder=str(path.parent),
        files=(path,),
        source_bytes=path.stat().st_size,
        original=original,
    )
    return FxView.from_program(program, source=source, dim_names=dim_names(program))


def _load_module(path: Path) -> torch.nn.Module:
    """The program's own module, read anew: what is made functional is not what was saved."""
    program = _load(path)
    program._guards_code = []
    with quiet():
        return program.module()


def _load(path: Path) -> torch.export.ExportedProgram:
    # torch.export.load would go on to read the layout of torch 2.7, which nothing has inspected.
    from torch.export.pt2_archive._package import load_pt2 as read_archive

    # The second lock: with this set, torch.load refuses code even where it is told to take it.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with quiet():
            return read_archive(str(path)).exported_programs["model"]
    except Exception as error:
        # torch's reader raises errors of every kind for what it does not understand.
        reason = first_line(error)
        raise BadInput(f"{path}: torch {torch.__version__} cannot load it: {reason}") from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# --- inspection ---------------------------------------------------------------------------------


def _inspect(path: Path) -> None:
    # torch's own reader, so that what is inspected is what is loaded.
    with _reading(path):
        archive = torch._C.PyTorchFileReader(str(path))
        records: list[str] = archive.get_all_records()
    strange = [r for r in records if not _RECORDS.fullmatch(r)]
    if strange or len(set(records)) != len(records):
        raise _refused(path, f"it holds {strange[0] if strange else 'a file twice'}")
    needed = (
        "models/model.json",
        "data/weights/model_weights_config.json",
        "data/constants/model_constants_config.json",
        "data/sample_inputs/model.pt",
    )
    absent = [r for r in needed if r not in records]
    if absent:
        raise BadInput(f"{path}: not an archive of torch.export.save (no {absent[0]})")
    sizes = record_sizes(path)
    for record in needed[:3]:
        described = _json(path, archive, record)
        for problem in _problems(described, ""):
            raise _refused(path, f"{record}: {problem}")
        if record != needed[0]:
            check_tensors(described, record.rpartition("/")[0], sizes, path)
    with _reading(path):
        samples = archive.get_record(needed[3])
    try:
        if samples:
            torch.load(io.BytesIO(samples), weights_only=True)
    except Exception as error:
        raise _refused(path, f"{needed[3]} is a pickle of more than tensors") from error


def _refused(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{path}: refused: {what}, and what could run code is never loaded. Save the model again "
        "with torch.export.save(torch.export.export(module, args), file) and plain tensors"
    )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever torch's reader raises as ``BadInput``; names that are no text are ``ValueError``."""
    try:
        yield
    except Exception as error:
        reason = first_line(error).partition(". ")[0]
        raise BadInput(f"{path}: not a .pt2 archive, or damaged ({reason})") from None


def _json(path: Path, archive: Any, record: str) -> Any:
    with _reading(path):
        data = archive.get_record(record)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: not a .pt2 archive ({record} is not JSON)") from None


def _problems(item: Any, key: str, depth: int = 0) -> Iterator[str]:
    """What in a decoded JSON value could be more than data, in words."""
    if key in _FREE_TEXT or key == "guards_code":
        return
    if depth > _DEEPEST:
        yield f"{key} is more than {_DEEPEST} levels deep"
    elif isinstance(item, dict):
        if item.get("use_pickle"):
            yield f"{item.get('path_name')} is pickled"
        for name, value in item.items():
            if not _NAME.fullmatch(name):
                yield f"{name!r} is not a name"
            yield from _problems(value, name, depth + 1)
    elif isinstance(item, list):
        for value in item:
            yield from _problems(value, key, depth + 1)
    elif isinstance(item, str) and not _harmless(item, key):
        yield f"{item[:80]!r} is not a plain {key or 'text'}"


def _harmless(text: str, key: str) -> bool:
    if key == "target":
        return _is_operator(text)
    if key == "expr_str":
        return _is_expression(text)
    if key in ("in_spec", "out_spec"):
        return _is_tree(text)
    return _NAME.fullmatch(text) is not None


def _is_operator(text: str) -> bool:
    match = _OPERATOR.fullmatch(text)
    if match is None or match[1] is None:
        return match is not None
    packet = getattr(getattr(torch.ops, match[1]), match[2], None)
    return isinstance(getattr(packet, match[3], None), torch._ops.OpOverload)


def _is_expression(text: str) -> bool:
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_arithmetic(node) for node in nodes)


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _FUNCTION.fullmatch(node.func.id) is not None
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        return re.fullmatch(r"[a-z]+\d+", str(node.value)) is not None
    return isinstance(node, _EXPRESSION)


def _is_tree(text: str) -> bool:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return False
    pending = [tree[1]] if isinstance(tree, list) and len(tree) == 2 else [None]
    while pending:
        spec = pending.pop()
        if not isinstance(spec, dict) or spec.get("type") not in _CONTAINERS:
            return False
        context = spec.get("context")
        if not re.fullmatch(r'null|\[("[\w.\-]*"(, "[\w.\-]*")*)?\]', context or "null"):
            return False
        pending.extend(spec.get("children_spec", ()))
    return True
