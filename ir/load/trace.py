"""``trace``: from an ``nn.Module`` to the functional graph of ``torch.export``."""

from __future__ import annotations

import contextlib
import functools
import re
import traceback
from collections.abc import (
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from ..core.errors import BadInput
from ..core.heap import uncollected
from ..core.quiet import quiet
from ..core.view import Source
from ..core.weights import Weight
from ..fx.view import FxView
from ..structure.cache_slots import PAST_AXIS
from .fake import Inputs, fake_meta
from .functional import functional
from .lean_export import lean_export
from .limits import tell_limits
from .original import ModuleOriginal, traced_call
from .overflow import AlwaysClamped
from .plain_call import bind, check_module, plain_call
from .repeated_blocks import repeated_blocks
from .short_types import short_types


def trace(
    module: torch.nn.Module,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    source: Source | None = None,
    weights: Mapping[str, Weight] | None = None,
    narrow: bool = False,
) -> FxView:
    """The graph of ``module`` in evaluation mode, functional, without gradients.

    ``args`` and ``kwargs`` are example inputs, by which the module is called with fake tensors.
    What of them is not a tensor (flags, numbers, ``None``) is bound; a cache of transformers is
    given in its tensors (``past_key_values.N.key``), and what a model returns in a class of its own
    goes by the names of that class (``logits``, ``present.N.key``).
    ``dynamic_shapes`` is what ``torch.export.export`` takes; ``None`` makes dimension 0 of every
    input dynamic (``batch``), and dimension 1 of 2-D inputs of integers (``seq``), as far as the
    module allows; ``{}`` keeps every shape as given. Parameters on the meta device stay there:
    ``weights`` gives their handles by qualified name. With ``narrow``, dimensions that the module
    bounds more closely than ``dynamic_shapes`` says are bounded so, and ``source`` notes it. The
    module is left as it was, but for meta parameters, which become fake ones. The graph keeps it:
    it is what ``optimize`` holds the graph against.

    Raises ``BadInput`` where the inputs do not fit ``forward``, where the module cannot be traced
    (naming the submodule and the line), and where it draws random numbers or changes its own
    parameters in evaluation mode.
    """
    check_module(module)
    positional = (args,) if isinstance(args, torch.Tensor) else args
    if not isinstance(positional, tuple | list):
        advice = ": inputs by name go into kwargs=" if isinstance(positional, Mapping) else ""
        raise BadInput(
            f"args is a {type(args).__name__}, and must be a tensor, or a tuple of what forward "
            f"takes{advice}"
        )
    positional = tuple(positional)
    call = plain_call(module, positional, kwargs or {})
    inputs: Inputs = _distinct(call.inputs)
    with (
        call.given_to(module), _evaluation(module), quiet(), torch.no_grad(), uncollected(),
        _uncached(),
    ):  # fmt: skip
        shapes: Callable[[set[str], str], Any | None] | None = None
        if dynamic_shapes is None:
            # A mask is as long as a cache and its text: of one token more, nothing would fit.
            inputs = pytree.tree_map(_two_rows if call.caches else _widen, inputs)
            arguments = bind(module, *inputs)
            shapes = functools.partial(_loosened, arguments, call.caches)
            dynamic_shapes = _auto_shapes(arguments, call.caches)
        inputs = fake_meta(module, inputs)
        bounds: dict[str, str] = {}
        if narrow:
            shapes = functools.partial(_bounded, dynamic_shapes, bounds)
        program = _export(module, inputs, dynamic_shapes, shapes, bounds if narrow else None)
    refuse_randomness(program)
    _refuse_changed_parameters(program)
    names = dim_names(program, dynamic_shapes)
    if source is None:
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        source = Source(kind="memory", name=type(module).__name__, source_bytes=size)
    source.notes += tuple(bounds.values())
    view = FxView.from_program(program, weights=weights, source=source, dim_names=names)
    if call.caches:
        view.set_inputs(dict(zip(call.input_names(view.input_names()), view.inputs(), strict=True)))
        view.edits = 0
    if source.original is None and weights is None:
        named = zip(view.input_names(), map(view.type, view.inputs()), strict=True)
        source.original = ModuleOriginal(
            f"the module {type(module).__name__}", lambda: module,
            traced_call(program, call, dict(named)),
        )  # fmt: skip
    return view


def _distinct(inputs: Any) -> Any:
    """The inputs, none of them twice: the exporter merges inputs that are one tensor."""
    seen: set[int] = set()

    def once(leaf: torch.Tensor) -> torch.Tensor:
        if id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map_only(torch.Tensor, once, inputs)


# --- dynamic dimensions -------------------------------------------------------------------------


def _dynamic_dims(leaf: Any) -> dict[int, str]:
    if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
        return {}
    tokens = leaf.dim() == 2 and not (leaf.is_floating_point() or leaf.is_complex())
    return {0: "batch", 1: "seq"} if tokens else {0: "batch"}


def _widen(leaf: Any) -> Any:
    """The tensor with two of what it has one of: the exporter takes a size of 1 for a constant."""
    for dim in _dynamic_dims(leaf):
        if leaf.shape[dim] == 1:
            leaf = torch.cat([leaf, leaf], dim)
    return leaf


def _two_rows(leaf: Any) -> Any:
    """``_widen`` along dimension 0 alone."""
    one = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == 1
    return torch.cat([leaf, leaf]) if one else leaf


def _auto_shapes(
    bound: Mapping[str, Any], caches: Container[str], loose: Iterable[str] = ()
) -> dict[str, Any]:
    """Dynamic shapes for the inputs: equal sizes are one dimension, but for those named ``loose``.

    Of a loose dimension the exporter may make several, or a constant. ``caches`` names arguments
    whose tensors hold the tokens before.
    """
    sizes: dict[str, int] = {}
    dims = {name: Dim(name) for name in ("batch", "seq", "past")}

    def spec(leaf: Any, cached: bool) -> dict[int, Any] | None:
        axes: dict[int, Any] = {}
        of_cache = {0: "batch", PAST_AXIS: "past"}
        for index, name in (of_cache if cached else _dynamic_dims(leaf)).items():
            same = sizes.setdefault(name, leaf.shape[index]) == leaf.shape[index]
            axes[index] = dims[name] if same and name not in loose else Dim.AUTO
        return axes or None

    return {
        name: pytree.tree_map(functools.partial(spec, cached=name in caches), value)
        for name, value in bound.items()
    }


def dim_names(program: ExportedProgram, dynamic_shapes: Any = None) -> dict[str, str]:
    """Names for the exporter's symbols: ``{"s43": "batch", "s53": "seq"}``.

    A ``torch.export.Dim`` keeps its name; other dimensions are named by their place.
    """
    inputs = set(program.graph_signature.user_inputs)
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.name in inputs}
    specs = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else {}
    if isinstance(dynamic_shapes, list | tuple):
        specs = dict(zip(values, dynamic_shapes, strict=False))
    names: dict[str, str] = {}
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        usual = _dynamic_dims(value)
        sizes: Sequence[int | torch.SymInt] = value.shape
        for index, size in enumerate(sizes):
            symbol = str(size)
            if isinstance(size, int) or not symbol.isidentifier() or symbol in names:
                continue
            base = _dim_name(_spec_of(specs, name), index) or usual.get(index, f"{name}_{index}")
            same = sum(n == base or n.startswith(f"{base}_") for n in names.values())
            names[symbol] = f"{base}_{same}" if same else base
    return names


def _spec_of(specs: Mapping[str, Any], name: str) -> Any:
    """The shape given for an input; one out of a list of an argument has its places in its name."""
    if name in specs:
        return specs[name]
    argument, _, places = re.sub(r"((?:_\d+)+)$", r" \1", name).partition(" _")
    spec = specs.get(argument)
    for place in places.split("_"):
        if not isinstance(spec, list | tuple) or int(place) >= len(spec):
            return None
        spec = spec[int(place)]
    return spec


def _dim_name(spec: Any, index: int) -> str | None:
    if isinstance(spec, Mapping):
        dim = spec.get(index)
    else:
        dim = spec[index] if isinstance(spec, list | tuple) and index < len(spec) else None
    return dim.__name__ if isinstance(dim, Dim) else None


_TORCH = str(Path(torch.__file__).parent)
_EXPORTER = (
    __file__,
    f"{_TORCH}/export",
    f"{_TORCH}/_export",
    f"{_TORCH}/nn/modules/module.py",
)
"""Files whose lines say nothing about where in a model a trace failed."""


# --- exporting ----------------------------------------------------------------------------------


def _export(
    module: torch.nn.Module,
    inputs: Inputs,
    dynamic_shapes: Any,
    narrower: Callable[[set[str], str], Any | None] | None,
    notes: dict[str, str] | None = None,
) -> ExportedProgram:
    """A functional program. ``narrower`` makes other shapes of what was tried and the exporter's
    words, or none. With ``notes``, where the exporter cannot decide for all sizes what the code
    asks of one, it goes as it does for the inputs, and they say so."""
    loose: set[str] = set()
    assumed = False
    while True:
        try:
            with repeated_blocks(module), lean_export(), short_types(), AlwaysClamped():
                program = torch.export.export(
                    module, *inputs, dynamic_shapes=dynamic_shapes or None, strict=False,
                    prefer_deferred_runtime_asserts_over_guards=assumed,
                )  # fmt: skip
                if assumed and notes is not None:
                    tell_limits(program, dim_names(program, dynamic_shapes), notes)
                return _on_cpu(functional(program))
        except Exception as error:
            changed = None if narrower is None else narrower(loose, str(error))
            undecided = re.search(_UNDECIDED, str(error))
            if changed is None and undecided and notes is not None and not assumed:
                assumed, name = True, undecided[1]
                notes[name] = (
                    f"the model's code compares sizes of {name} in ways that are not decided for "
                    "all of them: the graph goes as it does for the example's"
                )
                continue
            if changed is None:
                # Whatever a model's own code raises, the person who named the model must hear it.
                raise BadInput(_explain(module, error)) from error
            dynamic_shapes = changed


def _loosened(
    bound: Mapping[str, Any], caches: Container[str], loose: set[str], message: str
) -> Any | None:
    """Shapes without those names that the exporter says are violated; ``None`` where none are."""
    named = re.search(r"Constraints violated \(([^)]*)\)", message)
    violated = set(named[1].split(", ")) & {"batch", "seq", "past"} if named else set()
    if not violated - loose:
        return None
    loose |= violated
    return _auto_shapes(bound, caches, loose)


_ALONE = r"(\w+) = L\[.* guard (?:\(\((-?\d+)\) \+ )?L\[[^ ]+\)? != (\d+)\.?(?:\s|$)"
"""In the exporter's words, a dimension, and the one size of it that behaves as no other does: the
number behind ``!=``, less what is added before it."""


_UNDECIDED = r"values of (\w+) = .* generated guard"
"""In the exporter's words, a dimension of which the code asks what no bound of it settles."""


def _bounded(shapes: Any, notes: dict[str, str], tried: set[str], message: str) -> Any | None:
    """The shapes that are given, bounded as the exporter proposes; ``None`` where it does not.

    It proposes no bound where one size behaves as no other does: then that one is left out.
    """
    if message in tried or "Constraints violated" not in message:
        return None
    tried.add(message)
    limits = {d.__name__: d.max for d in pytree.tree_leaves(shapes) if isinstance(d, Dim)}
    ranges = {
        name: dict(re.findall(r"(min|max)=(\d+)", bounds))
        for name, bounds in re.findall(r"^\s*(\w+) = Dim\('\w+'(.*)\)$", message, re.M)
        if name in limits  # It proposes dims of its own too, that others are multiples of.
    }
    fixed = dict(re.findall(r"^\s*(\w+) = (\d+)$", message, re.M))
    for name, shift, number in re.findall(_ALONE, message):
        alone = int(number) - int(shift or 0)
        # Left out with what lies behind it on the side that is farther from the usual sizes.
        bound = {"max": alone - 1} if alone > limits.get(name, 0) // 2 else {"min": alone + 1}
        ranges.setdefault(name, {key: str(size) for key, size in bound.items()})
    if not ranges and not fixed:
        return None
    for name, bounds in ranges.items():
        terms = [f"{word} {bounds[key]}" for key, word in (("min", "at least"), ("max", "at most"))
                if key in bounds]  # fmt: skip
        notes[name] = f"the graph is for sizes of {name} of {' and '.join(terms)}"
    for name, size in fixed.items():
        notes[name] = f"the model's code fixes {name}: the graph is for {size} alone"

    def narrowed(dim: Any) -> Any:
        if not isinstance(dim, Dim):
            return dim
        name = dim.__name__
        if name in fixed:
            return None
        limits = {key: int(value) for key, value in ranges.get(name, {}).items()}
        bounds = {"min": getattr(dim, "min", None), "max": getattr(dim, "max", None)} | limits
        return Dim(name, **{key: size for key, size in bounds.items() if size is not None})

    return pytree.tree_map_only(Dim, narrowed, shapes)


def _on_cpu(program: ExportedProgram) -> ExportedProgram:
    from torch.export.passes import move_to_device_pass

    tensors = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    if all(t.device.type == "cpu" for t in tensors if isinstance(t, torch.Tensor)):
        return program
    return move_to_device_pass(program, "cpu")


def _explain(module: torch.nn.Module, error: BaseException) -> str:
    names = {id(m): name for name, m in module.named_modules()}
    where, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
        owner = frame.f_locals.get(first)
        file = frame.f_code.co_filename
        if id(owner) not in names or file.startswith(_EXPORTER):
            continue
        name = names[id(owner)]
        where = f"in {name} ({type(owner).__name__})" if name else f"in {type(owner).__name__}"
        line = f", {file}:{number}"
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "Constraints violated" in reason:
        details = [s[2:] for s in lines if s.startswith("- ")]
        fixes = [s for s in lines if re.fullmatch(r"\w+ = .*", s)]
        advice = f"Try dynamic_shapes= with: {'; '.join(fixes) or 'that dimension static'}"
        reason = details[0].split(". If")[0] if details else reason
        return f"tracing failed: {reason}\n{advice}"
    where = f" {where}{line}" if where else ""
    return f"tracing failed{where}: {reason}\n{_advice(error)}"


def _advice(error: BaseException) -> str:
    kind, text = type(error).__name__, str(error)
    if "DataDependent" in kind or "data-dependent" in text:
        return (
            "The control flow depends on the values of a tensor. Try torch.where, or a wrapper "
            "module that takes the path you need"
        )
    return (
        "Try inputs that module(*args, **kwargs) accepts, a wrapper module without the code at "
        "that line, or a submodule"
    )


def refuse_randomness(program: ExportedProgram) -> None:
    """Raise ``BadInput`` where a graph draws random numbers or updates statistics as in training.

    Nothing could be verified on such a graph.
    """
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        arguments = _arguments(node)
        training = arguments.get("train") or arguments.get("training")
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        # dropout(x, p, train=False) and attention with dropout_p=0 carry the tag, yet are exact.
        exact = "train" in arguments or "dropout_p" in arguments
        if training or arguments.get("dropout_p") or (random and not exact):
            stack = list(node.meta.get("nn_module_stack", {}).values())
            scope = next((path for path, _ in reversed(stack) if path), "the module")
            raise BadInput(
                f"{scope}: {node.target} draws random numbers or updates statistics in evaluation "
                "mode. Try passing training=self.training to functional dropout and batch_norm"
            )


def _refuse_changed_parameters(program: ExportedProgram) -> None:
    """Raise ``BadInput`` where a run leaves other parameters behind: a graph's stay as they are."""
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.PARAMETER_MUTATION:
            raise BadInput(
                f"the forward changes its own parameter {spec.target!r}, which a graph cannot. Try "
                "a module whose parameters have been changed before (as RWKV's are by a first "
                "forward in evaluation mode), given to gw.trace, or one whose config does not ask "
                "for it (rescale_every=0)"
            )


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    positional = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {a.name: a.default_value for a in schema} | positional | node.kwargs


# --- surroundings -------------------------------------------------------------------------------


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """No cache of what ops do to fake tensors: with symbols for sizes a key and an entry cost more
    than the op (a decoder of 24 layers and its cache: 8.1 s with it, 6.9 s without)."""
    import torch._dynamo.config as dynamo

    with dynamo.patch(fake_tensor_cache_enabled=False):
        yield


@contextlib.contextmanager
def _evaluation(module: torch.nn.Module) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    # Set directly: the modules that torch.export returns refuse a call of eval().
    for m, _ in before:
        m.training = False
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
