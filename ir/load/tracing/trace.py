"""``trace``: from an ``nn.Module`` to the functional graph of ``torch.export``."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import (
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...core.errors import BadInput
from ...core.heap import uncollected
from ...core.quiet import quiet
from ...core.size_bounds import sizes_metadata
from ...core.view import Source
from ...core.weights import Weight
from ...fx.view import FxView
from .dynamic_dims import auto_shapes, bounded, dim_names, loosened, two_rows, widen
from .fake import Inputs, fake_meta
from .functional import functional
from .lean_export import lean_export
from .limits import Limits, tell_limits
from .original import ModuleOriginal, traced_call
from .overflow import AlwaysClamped
from .plain_call import bind, check_module, plain_call
from .repeated_blocks import repeated_blocks
from .short_types import short_types
from .trace_refusals import explain, refuse_changed_parameters, refuse_randomness


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
        _ALONE, call.given_to(module), _evaluation(module), quiet(), torch.no_grad(),
        uncollected(), _uncached(),
    ):  # fmt: skip
        shapes: Callable[[set[str], str], Any | None] | None = None
        if dynamic_shapes is None:
            # A mask is as long as a cache and its text: of one token more, nothing would fit.
            inputs = pytree.tree_map(two_rows if call.caches else widen, inputs)
            arguments = bind(module, *inputs)
            shapes = functools.partial(loosened, arguments, call.caches)
            dynamic_shapes = auto_shapes(arguments, call.caches)
        inputs = fake_meta(module, inputs)
        limits = Limits()
        if narrow:
            shapes = functools.partial(bounded, dynamic_shapes, limits)
        program = _export(module, inputs, dynamic_shapes, shapes, limits if narrow else None)
    refuse_randomness(program)
    refuse_changed_parameters(program)
    names = dim_names(program, dynamic_shapes)
    if source is None:
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        source = Source(kind="memory", name=type(module).__name__, source_bytes=size)
    source.notes += limits.notes
    view = FxView.from_program(program, weights=weights, source=source, dim_names=names)
    view.metadata().update(sizes_metadata(limits.sizes))
    if call.caches:
        view.set_inputs(dict(zip(call.input_names(view.input_names()), view.inputs(), strict=True)))
        view.count_anew()
    if source.original is None and weights is None:
        source.original = ModuleOriginal(
            f"the module {type(module).__name__}", lambda: module,
            traced_call(program, call, view.input_types()),
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


# --- exporting ----------------------------------------------------------------------------------

_ALONE = threading.RLock()
"""Traces go one by one: what torch and this package change of torch for one of them is the whole
process's, and of two at a time the second would leave it changed."""


def _export(
    module: torch.nn.Module,
    inputs: Inputs,
    dynamic_shapes: Any,
    narrower: Callable[[set[str], str], Any | None] | None,
    limits: Limits | None = None,
) -> ExportedProgram:
    """A functional program. ``narrower`` makes other shapes of what was tried and the exporter's
    words, or none. With ``limits``, where the exporter cannot decide for all sizes what the code
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
                if assumed and limits is not None:
                    tell_limits(program, dim_names(program, dynamic_shapes), limits)
                return _on_cpu(functional(program))
        except Exception as error:
            changed = None if narrower is None else narrower(loose, str(error))
            undecided = re.search(_UNDECIDED, str(error))
            if changed is None and undecided and limits is not None and not assumed:
                assumed, name = True, undecided[1]
                limits.words[name] = (
                    f"the model's code compares sizes of {name} in ways that are not decided for "
                    "all of them: the graph goes as it does for the example's"
                )
                continue
            if changed is None:
                # Whatever a model's own code raises, the person who named the model must hear it.
                raise BadInput(explain(module, error)) from error
            dynamic_shapes = changed


_UNDECIDED = r"values of (\w+) = .* generated guard"
"""In the exporter's words, a dimension of which the code asks what no bound of it settles."""


def _on_cpu(program: ExportedProgram) -> ExportedProgram:
    from torch.export.passes import move_to_device_pass

    tensors = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    if all(t.device.type == "cpu" for t in tensors if isinstance(t, torch.Tensor)):
        return program
    return move_to_device_pass(program, "cpu")


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
