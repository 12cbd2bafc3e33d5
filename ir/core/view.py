"""One small interface over both native graphs.

``Node`` and ``Value`` are the native objects themselves (``torch.fx.Node``; ``onnx_ir.Node`` and
``onnx_ir.Value``), opaque to a pass: it hands them back to the view that gave them. A wrapper
object per access would cost the rewriting engine a third of its speed and add nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NewType, Protocol, TypeAlias, TypeGuard

import torch

from .errors import InvalidGraph, Refusal
from .types import Type
from .weights import Weight

Node = NewType("Node", object)
"""A native node, opaque: ``torch.fx.Node`` or ``onnx_ir.Node``."""
Value = NewType("Value", object)
"""A native value, opaque: ``torch.fx.Node`` (one output, or its ``getitem``), ``onnx_ir.Value``."""
Operand: TypeAlias = Value | float | int | bool | None
"""What a node takes: a ``Value``, a Python number, or ``None`` for an absent optional operand."""
Attr: TypeAlias = (
    int | float | bool | str | torch.dtype | tuple[int, ...] | tuple[float, ...] | None
)
"""What an attribute is built with. Which of them one read from a node is follows from its op."""



def is_value(operand: Operand) -> TypeGuard[Value]:
    """Whether an operand is a value of the graph: no number, and not absent."""
    return operand is not None and not isinstance(operand, int | float)


NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
"""What ``torch.export`` gives as the module path of a node that no module made."""
NATIVE = "native"
"""The op name of a node that the vocabulary does not cover: kept untouched."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which rewrite made a node: the rule's name and the number of the pass it ran in."""

    rule: str
    step: int = 0


Run: TypeAlias = Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""From inputs to outputs, by the graph's names. A key-value cache that is left out is empty. Raises
``BadInput`` where the source does not take the inputs."""


class Original(Protocol):
    """Runs what a graph was read from, with no code of ours between its file and its numbers."""

    @property
    def by(self) -> str:
        """What runs it, in messages for users: ``ONNX Runtime 1.31.1``."""

    def start(self, watched: Collection[str] = ()) -> Run:
        """Load it. With ``watched``, names that ``visible`` gave, a run gives those values in the
        place of the outputs. What was loaded goes when the result does.

        Raises ``BadInput`` or ``Missing`` where it cannot be run here.
        """

    def visible(self, view: View) -> Mapping[Value, str]:
        """The computed values of the graph that the source can show, and what it calls them."""


@dataclass
class Source:
    """Where a graph came from: for the manifest, for replay and for copying side files."""

    kind: str = "memory"
    """``zoo``, ``hf``, ``onnx``, ``pt2``, ``gguf``, ``factory`` or ``memory``."""
    name: str = ""
    sha256: str = ""
    folder: str | None = None
    """Folder whose tokenizer and config files go into the artifact."""
    source_bytes: int = 0
    dtype: torch.dtype | None = None
    """The float that it was taken in, where it could have been taken in another."""
    task: str = ""
    """``text-generation``, ``image-text-to-text``, ``image-classification``, ``text-embedding``,
    ``text-ranking``, or empty where unknown."""
    prompt: tuple[int, ...] = ()
    """Tokens that every row of ``input_ids`` must hold: one for each feature of its image."""
    least: Mapping[str, int] = field(default_factory=dict)
    """Sizes of dimensions, by name, below which the model takes nothing."""
    files: tuple[Path, ...] = ()
    """The files that ``sha256`` is taken over: see ``load.fingerprint``."""
    notes: tuple[str, ...] = ()
    """What a person should know of how it was read, one sentence each."""
    done: str = ""
    """The recipe that made this graph of the source, in runs before; empty for the source's own."""
    sampler: Callable[[], list[dict[str, torch.Tensor]]] | None = None
    """Makes ``samples``."""
    original: Original | None = None
    """Runs the source itself, where it was read with what can."""
    truth: Any = None
    """What it gave: see ``run.truth``."""
    owner: object = None
    """What ``folder`` goes with, where it is a temporary one."""

    @cached_property
    def samples(self) -> list[dict[str, torch.Tensor]]:
        """Batches of real inputs by input name, made at first use; empty if the source has none."""
        return [] if self.sampler is None else self.sampler()

    def behind(self, recipe: str) -> Source:
        """The source of what a recipe makes of this graph."""
        after = replace(self, done=",".join(filter(None, (self.done, recipe))))
        if "samples" in vars(self):  # which are made once
            vars(after)["samples"] = self.samples
        return after


class View(ABC):
    """Reads and edits one graph in the words of ``vocab``. See ``fx.FxView``, ``onnx.OnnxView``."""

    kind: ClassVar[Literal["fx", "onnx"]]
    source: Source
    origin: Origin | None = None
    """Provenance given to each node that is built while it is set."""
    journal: list[Any] | None = None
    """Where each native node is noted that is inserted while it is set."""
    edits: int = 0
    """How often nodes, operands, weights, inputs or outputs have been changed since the graph was
    read, copies of it among that; types do not count. Whoever kept the number knows by it whether
    the graph is still the same."""
    canonical: int | None = None
    """The ``edits`` at which the graph was last canonicalized, by which a second time is spared."""
    _stale: set[Node] | None = None
    """Nodes whose types are to be inferred at the end of ``one_edit``."""

    # --- reading -----------------------------------------------------------------------------

    @abstractmethod
    def nodes(self) -> Iterator[Node]:
        """Nodes in topological order, without inputs, weights, ``getitem`` and the output."""

    @abstractmethod
    def op(self, node: Node) -> str:
        """The vocabulary's name of the node's op, or ``"native"``."""

    @abstractmethod
    def native_op(self, node: Node) -> str:
        """The graph's own name of the op: ``aten.add.Tensor``, ``Add``, ``com.microsoft::Gelu``."""

    @abstractmethod
    def is_pure_native(self, node: Node) -> bool:
        """Whether a native node gives equal results for equal operands."""

    @abstractmethod
    def infer_types(self) -> bool:
        """Fill in the types that the graph leaves out; whether any was."""

    @abstractmethod
    def operands(self, node: Node) -> tuple[Operand, ...]:
        """Operands in the vocabulary's order; for a native node its tensor inputs in order.

        Trailing absent operands are left out. Numbers appear as Python numbers in FX and may appear
        as values in ONNX: ``number`` reads both.
        """

    @abstractmethod
    def attrs(self, node: Node) -> Mapping[str, Any]:
        """Attributes under the vocabulary's names, normalised (dims of known ranks are >= 0)."""

    @abstractmethod
    def read(self, node: Node) -> tuple[str, tuple[Operand, ...], Mapping[str, Any]] | None:
        """``op``, ``operands`` and ``attrs`` at once; ``None`` for a native node."""

    @abstractmethod
    def results(self, node: Node) -> tuple[Value, ...]:
        """The node's output values."""

    @abstractmethod
    def producer(self, value: Value) -> Node | None:
        """The node that makes a value; ``None`` for an input or a weight."""

    @abstractmethod
    def users(self, value: Value) -> tuple[Node, ...]:
        """The distinct nodes that use a value, in no fixed order; the graph's output is none."""

    @abstractmethod
    def is_output(self, value: Value) -> bool:
        """Whether the graph returns this value."""

    @abstractmethod
    def inputs(self) -> tuple[Value, ...]:
        """The graph's inputs, weights not among them."""

    @abstractmethod
    def outputs(self) -> tuple[Value, ...]:
        """The values that the graph returns."""

    @abstractmethod
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, as a caller gives them."""

    @abstractmethod
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, as a caller gets them."""

    @abstractmethod
    def type(self, value: Value) -> Type:
        """dtype and shape of a value; ``UNKNOWN`` where the graph does not say."""

    @abstractmethod
    def name(self, item: Node | Value) -> str:
        """The item's own name in the native graph; unique within it."""

    @abstractmethod
    def scope(self, node: Node) -> str:
        """Dotted path of the module that made the node (``encoder.layer.0.output``), or empty."""

    @abstractmethod
    def weight(self, value: Operand) -> Weight | None:
        """The handle behind a weight or constant; ``None`` for every other value."""

    def default(self, value: Value) -> Weight | None:
        """The numbers that a value has where no caller gives it others: those of a weight, or of an
        ONNX initializer that is an input too. The second are no constants to a rewrite."""
        return self.weight(value)

    @abstractmethod
    def weights(self) -> Mapping[str, Weight]:
        """All weights and constants of the graph by name."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """The graph's own key-value metadata, to read and write."""

    # --- editing -----------------------------------------------------------------------------

    @abstractmethod
    def build(
        self,
        op: str,
        operands: Sequence[Operand],
        attrs: Mapping[str, Attr] | None = None,
        *,
        before: Node,
        name: str | None = None,
        like: Value | None = None,
    ) -> Value:
        """Insert a node of the vocabulary before ``before`` and return its (first) result.

        ``like`` gives the result the type of another value; without it the type is inferred, at
        the latest when it is asked for. Raises ``Refusal`` (here, or from ``type``) where the
        operands do not fit the op.
        """

    @abstractmethod
    def rewire(self, node: Node, old: Value, new: Value) -> None:
        """Let one node, native or not, read ``new`` wherever it reads ``old``; types follow."""

    @abstractmethod
    def clone(
        self, node: Node, values: Mapping[Value, Value], *, before: Node
    ) -> tuple[Value, ...]:
        """Insert a copy of a node, native or not, before ``before``; its results.

        The copy reads ``values[v]`` where the node reads ``v``, and shares all other operands.
        Raises ``Refusal`` for a node that holds a subgraph.
        """

    @abstractmethod
    def retype(self, value: Value, like: Value) -> None:
        """Give a value the type of another where that one says more."""

    @abstractmethod
    def add_weight(self, name: str, weight: Weight) -> Value:
        """Add a weight. The name is made unique; a weight with the same key is shared."""

    @abstractmethod
    def replace(self, old: Value, new: Value) -> None:
        """Let every user of ``old``, and the graph's output, use ``new``.

        Where the two differ in type, types are inferred anew from there on. Raises
        ``InvalidGraph`` where a node does not take the new type.
        """

    @abstractmethod
    def set_operand(self, node: Node, index: int, operand: Operand) -> None:
        """Replace one operand (index as in ``operands``) of one node; types follow as there."""

    @abstractmethod
    def refresh_type(self, node: Node) -> bool:
        """Infer the types of a node's results anew; whether one contradicts what was declared."""

    @abstractmethod
    def renew_types(self, nodes: Iterable[Node], old: str, new: str) -> None:
        """Type the nodes' results anew where the dimension ``old`` has become ``new``; in order.

        Raises ``InvalidGraph`` where a node does not take its operands.
        """

    @abstractmethod
    def name_dim(self, value: Value, axis: int, name: str) -> None:
        """Call a dimension of a value by a name where the graph has none for it."""

    @abstractmethod
    def erase(self, node: Node) -> None:
        """Remove a node that nothing uses. Raises ``InvalidGraph`` where something does."""

    @abstractmethod
    def erase_dead(self, node: Node) -> list[Node]:
        """Erase a node and then its producers, as long as nothing uses them; the nodes erased."""

    @abstractmethod
    def set_weight(self, value: Value, weight: Weight) -> None:
        """Give a weight value other numbers: another handle of the same shape and dtype.

        Nodes, names and types stay. Every node that reads the value sees the new numbers, so a
        weight that one of them is to keep must not be set.
        """

    @abstractmethod
    def resize_weight(self, value: Value, weight: Weight) -> None:
        """As ``set_weight``, with another shape: types follow at the nodes that read it."""

    @abstractmethod
    def drop_unused_weights(self) -> int:
        """Remove weights that nothing uses; the number removed."""

    @abstractmethod
    def add_input(self, name: str, like: Value) -> Value:
        """A new input of the graph, of the type of ``like``, after those that there are."""

    @abstractmethod
    def set_inputs(self, named: Mapping[str, Value]) -> None:
        """Let the graph take these of its inputs, in this order and under these names.

        Raises ``InvalidGraph`` where one that is left out is used.
        """

    @abstractmethod
    def set_outputs(self, named: Mapping[str, Value]) -> None:
        """Let the graph return these values, in this order and under these names."""

    @abstractmethod
    def copy(self) -> View:
        """An independent copy of the graph. Weights are handles: none of their bytes is copied."""

    @abstractmethod
    def after(self, node: Node) -> Node:
        """The place right behind a node, as ``build(before=...)`` takes it."""

    @abstractmethod
    def execute(self, node: Node, args: Sequence[Any]) -> tuple[Any, ...]:
        """Run one node on real tensors with reference semantics.

        ``args`` stand for the values of ``arguments(node)`` in that order; returns one item for
        each of ``results(node)``.
        """

    @abstractmethod
    def arguments(self, node: Node) -> tuple[Value, ...]:
        """Every value that the node's native form reads, in a fixed order, without repetition."""

    # --- conveniences over the above ------------------------------------------------------------

    def count_anew(self) -> None:
        """Take the graph as it is for one that was just read: ``edits`` are counted from here."""
        self.edits, self.canonical = 0, None

    def input_types(self) -> dict[str, Type]:
        """The types of the inputs by their names, in their order."""
        return dict(zip(self.input_names(), map(self.type, self.inputs()), strict=True))

    def number(self, operand: Operand) -> float | int | bool | None:
        """A Python number behind an operand: itself, or a constant of one element."""
        if operand is None or isinstance(operand, int | float | bool):
            return operand
        weight = self.weight(operand)
        if weight is None or weight.numel != 1 or weight.dtype.is_complex:
            return None
        number: float | int | bool = weight.read().reshape(()).item()
        return number

    def tensor(self, node: Node, index: int = 0) -> Value:
        """An operand that is a value; ``Refusal`` where it is a number or absent."""
        operands = self.operands(node)
        operand = operands[index] if index < len(operands) else None
        if not is_value(operand):
            raise Refusal(f"operand {index} of {self.name(node)} is not a tensor", node)
        return operand

    def maker(self, value: Value) -> Node:
        """The node that makes a value; ``Refusal`` for an input or a weight."""
        node = self.producer(value)
        if node is None:
            raise Refusal(f"{self.name(value)} is not computed in the graph")
        return node

    def result(self, node: Node) -> Value:
        """The only result of a node; ``Refusal`` where it has several."""
        results = self.results(node)
        if len(results) != 1:
            raise Refusal(f"{self.name(node)} has {len(results)} results, one is needed", node)
        return results[0]

    @contextmanager
    def made_by(self, rule: str, step: int = 0) -> Iterator[None]:
        """Within it nodes that are built bear this provenance."""
        previous, self.origin = self.origin, Origin(rule, step)
        try:
            yield
        finally:
            self.origin = previous

    @contextmanager
    def one_edit(self) -> Iterator[None]:
        """Within it types may contradict each other: they are inferred anew once, at its end."""
        self._stale = set()
        try:
            yield
        finally:
            stale, self._stale = self._stale, None
        self.refresh_types(stale)

    def refresh_types(self, nodes: Iterable[Node]) -> None:
        """Infer types anew at nodes whose operands changed, and from there on while they change.

        Raises ``InvalidGraph`` where a node does not take its operands.
        """
        stale = set(nodes)
        if self._stale is not None:
            self._stale |= stale
            return
        for node in self.nodes() if stale else ():
            if node not in stale:
                continue
            try:
                changed = self.refresh_type(node)
            except Refusal as refusal:
                raise InvalidGraph(f"{self.name(node)}: {refusal.reason}") from None
            if changed:
                stale.update(user for r in self.results(node) for user in self.users(r))
