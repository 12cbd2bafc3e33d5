"""``graphwright.json``, the manifest of an artifact: its typed models, reading and writing it.

The models are the format: ``graphwright.schema.json`` beside this file is made from them by
``python -m graphwright.tools.report.schema``. Fields without a default are in every manifest; the
others are written where they were set. The forecast of ``--dry-run`` is the same model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
)

from ...ir.core.errors import BadInput
from ...ir.load.intact import facts

FILE_NAME = "graphwright.json"
SCHEMA: Final = 1
DEEPEST = 200
"""Levels of a manifest; a tree of modules has two for each level of the model."""
VOLATILE = frozenset({"created", "machine", "seconds", "peak_rss_bytes"})
"""Fields that differ between two runs of the same recipe on the same input."""


def _defined(value: object) -> object:
    """JSON has no NaN and no infinity: such a number is null, in lists and objects too."""
    if isinstance(value, dict):
        return {key: _defined(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_defined(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ours(versions: dict[str, str]) -> dict[str, str]:
    if "graphwright" not in versions:
        raise ValueError("should name graphwright")
    return versions


Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Real = Annotated[Finite | None, BeforeValidator(_defined)]
Json = Annotated[JsonValue, BeforeValidator(_defined)]
Amount = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_defined)]
Cosine = Annotated[
    Annotated[float, Field(ge=-1.000001, le=1.000001)] | None, BeforeValidator(_defined)
]
FileName = Annotated[
    str,
    Field(pattern=r"^(model\.onnx(\.data)?|(path-[a-z0-9_-]+|vision|embedding|text)\.onnx)$"),
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Entry(BaseModel):
    """Base of the manifest's parts: no field beyond its own, and no value of another type."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_assignment=True, use_attribute_docstrings=True
    )


# --- what was made of what -----------------------------------------------------------------------


class SourceEntry(Entry):
    """The model that went in."""

    kind: Literal["zoo", "hf", "onnx", "pt2", "gguf", "factory", "memory"]
    """Where it came from."""
    name: str
    """The MODEL argument, such as `zoo:minilm` or a path."""
    beside: str = ""
    """Its path from the artifact's folder, where it has one: `../model`."""
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    """Hash of the input's weights and graph; empty for a model that exists in memory only."""
    task: str = ""
    """What the model is for: `text-generation`, `image-text-to-text`, `image-classification`,
    `text-embedding`; empty where unknown."""
    cache: bool = False
    """Whether the model was loaded with its key-value cache; absent where it was not
    (`--no-cache`, or a model that has none)."""
    part: str = ""
    """The graph of an encoder-decoder that was taken: `encoder`, `decoder` or `decoder_with_past`;
    absent where it is the whole model."""
    notes: list[str] = []
    """What a person should know of how its files were read, one sentence each."""


class OriginalEntry(Entry):
    """The model that a source was compressed from by another tool: what passes close the gap to."""

    name: str
    """The model as it was asked for."""
    beside: str = ""
    """Its path from the artifact's folder, where it has one."""
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
    """Hash of its weights and graph."""


class MachineEntry(Entry):
    """The machine that made the artifact."""

    platform: str = ""
    """Operating system and architecture."""
    cpu: str = ""
    """Model name of the processor."""
    cores: Count = 0
    """Number of CPU cores that were usable."""
    threads: Count = 0
    """Number of threads that one operation ran on: it decides the order of some sums, and so the
    last bits of decompositions."""
    memory_bytes: Count = 0
    """Installed memory in bytes."""
    device: str = ""
    """Device that ran the verification: `cpu`, or a GPU's name."""


class CalibrationEntry(Entry):
    """Calibration data."""

    name: str
    """The data as it was asked for."""
    beside: str = ""
    """Its path from the artifact's folder, where it has one."""
    sha256: Sha256
    """Hash of the batches that were used."""
    samples: Count
    """Number of samples."""
    tokens: Count | None
    """Number of tokens; null where the data has none."""
    length: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Tokens that windows of text were cut to; null where there are none."""
    select: str = ""
    """How the samples were chosen among more, as it was asked for; empty for the first ones."""
    windows: str = ""
    """``joined`` where texts were cut as one, each behind the other; empty where each from its
    beginning."""
    pairs: Count = 0
    """Samples that are two texts which the model reads as a pair, as its tokenizer joins them."""


class StructureEntry(Entry):
    """What was recognised in the graph."""

    blocks: Count
    """Number of blocks on the residual spine."""
    linears: Count
    """Number of linear sites."""
    attention_sites: Count
    """Number of attention sites."""


class TensorsEntry(Entry):
    """Tensors of one role in all blocks."""

    name: str
    """Their name, each index as `*`."""
    dtype: str
    """What they hold."""
    count: Count
    """How many there are."""
    bytes: Count
    """Bytes of them all."""
    wider: str = ""
    """Why they take more bytes than what they were made of; empty where they do not."""


class SizesEntry(Entry):
    """Sizes in bytes."""

    source_bytes: Count
    """The source's weights."""
    artifact_bytes: Count
    """The artifact's model files: model.onnx and its external data."""
    tensors: list[TensorsEntry] = []
    """Where the artifact's bytes are: every role of tensors that holds at least 1 % of them, the
    largest first."""
    whole_bytes: Count | None = None
    """The model files of the artifact of any size that this one was cut from."""


class PathEntry(Entry):
    """A further entry graph of the artifact: another path through the model's blocks."""

    file: str
    """Its file, beside model.onnx; its weights lie in model.onnx.data."""
    blocks: str
    """The blocks in order, as the pass `path` takes them."""
    weight_bytes: Count
    """The weights that it reads."""
    added_bytes: Count
    """Bytes of the data file that the whole model does not read."""
    error: ErrorEntry
    """In ONNX Runtime, graph optimisation on, from its graph."""


class FileEntry(Entry):
    """A file as it was written."""

    bytes: Count
    """Its size."""
    sha256: Sha256
    """Its hash."""


class ForecastEntry(Entry):
    """Forecast of a dry run."""

    artifact_bytes: Count | None = None
    """Size of the artifact's model files."""
    peak_rss_bytes: Count | None = None
    """Peak resident memory."""
    seconds: Amount = None
    """Wall time in seconds."""


class CostRow(Entry):
    """What one sample costs at one point of the run."""

    name: str
    """`source`, or the pass's number and name."""
    macs: Count | None
    """Multiply-accumulates; null where the graph leaves a shape open."""
    weight_bytes: Count
    """Bytes of all weights in the graph."""
    kv_bytes: Count | None
    """Bytes of the keys and values that a decoder keeps for all tokens; 0 where none are kept,
    null where a shape is open."""
    tokens: list[Count | None]
    """Tokens that enter each block; null where a shape is open."""


class CostsEntry(Entry):
    """What one sample costs, of the source and behind each pass; by the graph's shapes."""

    convention: str
    """What counts as a multiply-accumulate."""
    sizes: dict[str, Count]
    """Numbers that stand for the symbolic dimensions of the inputs, by name."""
    rows: list[CostRow]
    """The source first, then one row a pass."""


class CutEntry(Entry):
    """One place at which image tokens leave the text."""

    name: str
    """The pass that made it; empty where the graph does not say."""
    block: Count
    """The block of the language model before which it is."""
    kept: list[Count]
    """The sample's image tokens that go on, by number, picture by picture and row by row."""


class ImageTokensEntry(Entry):
    """The pictures of one sample, and which of their patches the text still sees behind each
    cut."""

    rows: Count
    """Patches from top to bottom."""
    columns: Count
    """Patches from left to right."""
    pictures: list[str]
    """As the model sees them: JPEG files, base64."""
    cuts: list[CutEntry]
    """In the order of the model."""


class TreeEntry(Entry):
    """One module of the graph and what lies below it."""

    name: str
    """Last component of the module's dotted path; empty at the root."""
    ops: dict[str, Count]
    """Number of nodes of each op that belong to this very module, without its children."""
    params_bytes: Count
    """Bytes of the weights that this very module uses first, without its children."""
    children: list[TreeEntry]
    """Sub-modules in graph order."""


# --- what each pass did --------------------------------------------------------------------------


class ErrorEntry(Entry):
    """How far one result is from another; null where that is not defined or not finite."""

    rel_l2: Amount
    """Norm of the difference over the norm of the reference, over all elements."""
    cosine: Cosine
    """Cosine similarity of the two results, flattened; 1 is equal direction."""
    max_abs: Amount
    """Largest absolute difference of two elements."""


class OutputEntry(ErrorEntry):
    """Comparison of one output of the model."""

    name: str
    """Name of the output."""


class SiteEntry(Entry):
    """One place that a pass changed: a linear, an attention site, a block."""

    name: str
    """Dotted path of the site in the model, unique within the pass."""
    kind: str
    """What the site is: `linear`, `attention`, `block`, `embedding`, or a word of the pass's
    own."""
    shape: list[Count]
    """Shape of the site's weight before the pass, [out, in] for a linear; empty where it has
    none."""
    bytes_before: Count
    """Bytes of the site's weights before the pass."""
    bytes_after: Count
    """Bytes after it, with scales, zero points and side paths counted."""
    bits_per_weight: Amount = None
    """Stored bits per weight of the original matrix."""
    rel_l2: Amount = None
    """The site's own relative L2 error: of its weight, or of its output where the pass had
    calibration data."""
    seconds: Amount = None
    """Wall time spent on the site, in seconds."""
    note: str = ""
    """What a person should know about this site; absent where there is nothing."""
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of zeros in the weight; absent where the pass makes none."""


class RefusalEntry(Entry):
    """A place that a pass looked at and left alone."""

    site: str
    """Name of the site or node."""
    reason: str
    """Why the pass does not apply there."""


class PassEntry(Entry):
    """What one pass did."""

    order: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    """Position in the recipe, from 1."""
    name: str
    """Registered name of the pass, such as `quantize`."""
    text: str = ""
    """The pass as the recipe writes it, options included."""
    options: dict[str, Json]
    """All options by name, defaults included."""
    exact: bool
    """Whether the pass keeps the function up to rounding; a lossy pass does not."""
    sites: list[SiteEntry]
    """Sites that were changed, in graph order."""
    refused: list[RefusalEntry]
    """Sites that were looked at and left alone."""
    edits: Count = 0
    """Rewrites that have no site of their own, such as folded constants."""
    notes: list[str] = []
    """What a person should know about this run of the pass, one sentence each."""
    bytes_before: Count
    """Bytes of all weights of the graph before the pass."""
    bytes_after: Count
    """Bytes of all weights of the graph after the pass."""
    macs_before: Count | None
    """Multiply-accumulates of one sample before the pass; null where unknown."""
    macs_after: Count | None
    """The same after the pass."""
    error: ErrorEntry | None
    """Outputs after the pass against outputs before it, worst over outputs; null where it was not
    measured."""
    error_to_source: ErrorEntry | None = None
    """The worst output against the source's after this pass: what a compensating pass lowers."""
    seconds: Amount
    """Wall time of the pass with its verification, in seconds."""
    peak_rss_bytes: Count | None
    """Peak resident memory of the process up to the end of the pass, in bytes."""
    details: dict[str, Json] = {}
    """Results of the pass's own that no other field holds."""


# --- how it was checked --------------------------------------------------------------------------


class RuntimeEntry(Entry):
    """The written artifact, run by ONNX Runtime, against the rewritten graph run by the reference
    interpreter; worst over outputs. Another backend that `--backend` named stands under its name:
    the rewritten graph as that backend runs it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ErrorEntry]

    optimized: ErrorEntry | None
    """With the runtime's graph optimisation on; null where it was not run."""
    unoptimized: ErrorEntry | None
    """With it off; null where it was not run. Neither it nor the graph that it is compared with
    rounds activations, where linears do by `accuracy_level=4`."""
    optimization: ErrorEntry | None = None
    """With it on against with it off, both in float32 and without rounding: what the optimisation
    alone changes. Absent where the two above are that already, and of more than 512 MB; or where
    the rounding cannot be left out."""

    @property
    def backends(self) -> dict[str, ErrorEntry]:
        """The other backends' errors, by name."""
        return self.__pydantic_extra__


class TruthEntry(Entry):
    """The source itself, run by its own runtime or library before the first pass, and how far our
    reading of it is from that."""

    by: str
    """What ran it; empty where it was not run."""
    error: ErrorEntry | None
    """The graph as it was read against the source, worst over outputs and inputs; null where the
    source was not run."""
    probes: list[str]
    """What it was run on beside the samples."""
    unheard: str
    """Why it was not run, or not on inputs of other sizes; empty where it was."""


class VerificationEntry(Entry):
    """The result against the source, on sample inputs."""

    samples: Count = 0
    """Number of samples compared."""
    data: str = ""
    """Where the samples come from: the source's own, `--calib`, or random inputs."""
    source: TruthEntry | None = None
    """The source itself beside our reading of it."""
    max_error: Amount = None
    """Bound on rel_l2 that the user set; null for none."""
    outputs: list[OutputEntry]
    """The rewritten graph against the source graph, by output."""
    runtime: RuntimeEntry
    """The artifact in the runtime against the rewritten graph."""
    prepacked: bool = True
    """Whether ONNX Runtime, its optimisation on, repacked the weights as it does for a user; not
    where they were large: then it ran without the rounding of activations that repacked weights
    bring. With the optimisation off it did only where an op rounds activations that no attribute
    keeps it from."""


class EvaluatedEntry(Entry):
    """What one task says of one model."""

    figures: dict[str, Real]
    """Figures by name."""
    interval: dict[str, Annotated[list[Real], Field(min_length=2, max_length=2)]]
    """Ends of the 95 % confidence interval of each figure that has one; null where an end is not
    finite."""
    samples: Annotated[int, Field(ge=1, lt=2**63)]
    """Number of samples."""
    unit: str
    """What a sample is, in the plural."""
    detail: dict[str, Json]
    """Figures by kind of sample, and the setting they were taken in."""
    notes: list[str]
    """What a person should know about the figures, one sentence each."""
    seconds: Annotated[float, Field(ge=0)]
    """Wall time in seconds."""


class BeforeAfterEntry(Entry):
    """One task's results of the source and of the artifact, both in ONNX Runtime."""

    before: EvaluatedEntry
    """The source's result."""
    after: EvaluatedEntry
    """The artifact's result."""


class ComparedEntry(Entry):
    """One artifact or model among those that were judged side by side."""

    name: str
    """The folder or model as it was given."""
    kind: str
    """What the model is for; empty where unknown."""
    backend: str
    """Where it ran."""
    bytes: Count | None
    """Weights on disk; null where unknown."""
    results: dict[str, EvaluatedEntry]
    """Results by task."""


class ComparisonEntry(Entry):
    """The last `optimize-model eval` that this artifact took part in."""

    reference: str
    """Name of the original that others were compared with."""
    this: str
    """Name under which this artifact stands among the rows."""
    rows: Annotated[list[ComparedEntry], Field(min_length=1)]
    """What was judged, in the order in which it was named."""


class FrontEntry(Entry):
    """One recipe of a search: what it takes and what it loses."""

    recipe: str
    """The passes in order."""
    bytes: Count
    """Bytes of all weights of the graph."""
    loss: Amount
    """How much is lost, as `SearchEntry.loss_is` says; measured, or forecast and corrected by what
    was measured."""
    interval: Annotated[list[Real], Field(min_length=2, max_length=2)] | None = None
    """Ends of the 95 % interval of a measured loss; absent where it is a forecast."""
    costs: dict[str, Real] = {}
    """What else it costs: `kv`, bytes of keys and values of one sample; `ms`, milliseconds of one
    run, in turns with the source where the point is measured."""
    chosen: bool = False
    """Whether it is the artifact's."""

    def cost(self, measure: str) -> float | None:
        """What it costs by `bytes`, `ms` or `kv`; `None` where that was not asked."""
        return self.bytes if measure == "bytes" else self.costs.get(measure)


class PriceEntry(Entry):
    """What a megabyte buys on one knob: loss by 1,000,000 bytes, by forecast; or what a megabyte of
    keys and values does, or a millisecond."""

    knob: str
    """`bits`, `rank`, `tables`, `heads`, `layers`, `tokens` or `cache`."""
    of: str = "bytes"
    """`bytes`; `ms` where time is bounded, and `kv` where the cache is."""
    last: Amount = None
    """What the last one bought: what taking back the least useful step would lose."""
    last_step: str = ""
    """That step."""
    next: Amount = None
    """What one more would save by the most useful step."""
    next_step: str = ""
    """That step."""


class SearchEntry(Entry):
    """The search that found the recipe; it is not needed to repeat the run."""

    budget: str
    """What was asked for."""
    axis: Literal["bytes", "ms", "kv"] = "bytes"
    """What the front is drawn along: `bytes`, `ms` or `kv`."""
    limits: dict[str, Real]
    """The bounds as numbers, by measure."""
    source: dict[str, Real] = {}
    """What the source costs, by measure: what shares of it are of."""
    using: list[str]
    """The knobs that were turned."""
    loss_is: str
    """What the loss is, in words."""
    judged: Count
    """Rows of the calibration data that losses were measured on: nothing was fitted to them while
    the search ran."""
    held: dict[str, Count]
    """How many linears hold what, and what was left out."""
    front: list[FrontEntry]
    """Recipes by what they cost along the axis, measured and forecast."""
    prices: list[PriceEntry]
    """What megabytes buy, or milliseconds, by knob."""
    factors: dict[str, Real]
    """What forecasts were multiplied by after measuring, by kind of candidate."""
    notes: list[str] = []
    """What a person should know about the search."""


class Manifest(Entry):
    """The manifest of a Graphwright artifact, version 1: what went in, what was done to it, and how
    it was checked. All fields but times, memory peaks and the machine are the same on every run of
    the same recipe on the same input."""

    version: Literal[1] = Field(alias="schema")
    """Version of this format."""
    created: str = ""
    """When the artifact was made, ISO 8601 in UTC."""
    source: SourceEntry
    """The model that went in."""
    original: OriginalEntry | None = None
    """The model that the source was compressed from; null or absent where none was given."""
    recipe: str
    """The passes in order, as text that `optimize-model -p` takes."""
    target: str = "cpu"
    """What the artifact is written for: `cpu` is ONNX Runtime on a CPU, `cuda` on a GPU,
    `portable` standard ONNX ops alone."""
    dtype: str = ""
    """The float that the model was loaded in (`fp32`, `fp16`, `bf16`) because somebody asked, or
    before it was exported in Python; empty for its own, or for the one that the target prefers."""
    versions: Annotated[
        dict[str, str],
        AfterValidator(_ours),
        Field(json_schema_extra={"required": ["graphwright"]}),
    ]
    """Versions of graphwright, Python and the libraries that took part, by name."""
    machine: MachineEntry | None = None
    """The machine that made the artifact."""
    calibration: CalibrationEntry | None = None
    """Calibration data; null or absent where no pass needed any."""
    structure: StructureEntry | None = None
    """What was recognised in the graph."""
    costs: CostsEntry | None = None
    """What one sample costs, of the source and behind each pass."""
    image_tokens: ImageTokensEntry | None = None
    """Which image tokens of one sample go on; null or absent where none leaves."""
    passes: list[PassEntry]
    """What each pass did, in the order of the recipe."""
    verification: VerificationEntry
    """The result against the source, on sample inputs."""
    sizes: SizesEntry
    """Sizes in bytes."""
    notes: list[str] = []
    """What a person should know of how the artifact was written and checked, one sentence each;
    absent where there is nothing. What a pass has to say stands with it."""
    paths: dict[str, PathEntry] = {}
    """Further entry graphs by name; absent where there is none."""
    files: dict[FileName, FileEntry] = {}
    """The model's files as they were written, by name; they are compared when the artifact is
    opened. Absent where nothing was written."""
    search: SearchEntry | None = None
    """The search that found the recipe; absent where it was given."""
    predicted: ForecastEntry | None = None
    """Forecast of a dry run; absent in an artifact."""
    graph_before: TreeEntry | None = None
    """The source graph by module."""
    graph_after: TreeEntry | None = None
    """The rewritten graph by module."""
    eval: dict[str, BeforeAfterEntry] | None = None
    """What `--eval` found, by task; absent or null where no task was asked for."""
    comparison: ComparisonEntry | None = None
    """The last `optimize-model eval` that this artifact took part in; absent where there was
    none."""

    def to_json(self) -> dict[str, Any]:
        """As the file holds it: the fields that were set."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


# --- reading and writing -------------------------------------------------------------------------


def load(folder: Path | str) -> Manifest:
    """The manifest of the artifact in ``folder``.

    Raises ``BadInput`` where the folder is not a Graphwright artifact, where it was made by a newer
    version, and where a field is missing, unknown or of another type, which it names.
    """
    path = Path(folder)
    file = path if path.name == FILE_NAME else path / FILE_NAME
    if not file.is_file():
        why = f"it holds no {FILE_NAME}" if path.is_dir() else "there is no such folder"
        raise BadInput(f"{path}: not a Graphwright artifact: {why}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, also
        raise BadInput(f"{file}: not JSON: {error}") from None
    return parse(content, str(file))


def parse(content: object, where: str = FILE_NAME) -> Manifest:
    """The manifest that decoded JSON holds. Raises ``BadInput`` as ``load``, naming ``where``."""
    version = content.get("schema") if isinstance(content, dict) else None
    if type(version) is not int:
        raise BadInput(f"{where}: not a Graphwright manifest: it has no integer `schema`")
    if version > SCHEMA:
        raise BadInput(
            f"{where}: written in format {version}, and this Graphwright reads up to {SCHEMA}: "
            "upgrade it with `pip install -U graphwright`"
        )
    if _deeper_than(DEEPEST, content):
        raise BadInput(f"{where}: damaged: it is more than {DEEPEST} levels deep")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{where}: damaged: {_first(error)}") from None


def _deeper_than(levels: int, content: object) -> bool:
    layer: list[Any] = [content]
    for _ in range(levels):
        inner = [item.values() if isinstance(item, dict) else item for item in layer]
        layer = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not layer:
            return False
    return True


def _first(error: ValidationError) -> str:
    """The first wrong field by its path, and what is wrong with it."""
    wrong = error.errors(include_url=False, include_input=False)[0]
    path = ""
    for step in wrong["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    reasons = {"missing": "is missing", "extra_forbidden": "is not a field of this format"}
    message = wrong["msg"].removeprefix("Value error, ").replace("Input should", "should")
    reason = reasons.get(wrong["type"], message)
    return f"`{path.removeprefix('.')}` {reason}"


def write(folder: Path | str, manifest: Manifest) -> Path:
    """Write the manifest into ``folder``, keys sorted; the path of the file."""
    path = Path(folder) / FILE_NAME
    text = json.dumps(manifest.to_json(), sort_keys=True, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def files(folder: Path) -> dict[Any, FileEntry]:
    """The model's files in a folder, as ``Manifest.files`` holds them."""
    return {name: FileEntry(**known) for name, known in facts(folder).items()}


def stable(item: Any) -> Any:
    """JSON of a manifest, or of a part of one, without the fields that differ from run to run."""
    if isinstance(item, dict):
        return {key: stable(value) for key, value in item.items() if key not in VOLATILE}
    return [stable(value) for value in item] if isinstance(item, list) else item
