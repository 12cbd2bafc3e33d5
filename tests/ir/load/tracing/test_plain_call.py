"""Calls as libraries give them: flags and caches among the inputs, classes of outputs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from graphwright.ir.core.errors import BadInput
from graphwright.ir.load.tracing.trace import trace
from graphwright.ir.run.sweep import sweep
from torch import Tensor, nn

transformers: Any = importlib.import_module("transformers")

TEXT = {
    "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 64,
}  # fmt: skip
BART = {
    "encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50,
    "max_position_embeddings": 64,
}  # fmt: skip


def made(model: str, config: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def text(rows: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_decoder_gives_its_cache_by_name(family: str) -> None:
    """Gemma 2's own cache would keep the last tokens alone."""
    sizes = TEXT | ({"head_dim": 8, "sliding_window": 4} if family == "Gemma2" else {})
    model = made(f"{family}ForCausalLM", f"{family}Config", **sizes)
    view = trace(model, kwargs=text(2, 7))
    assert view.output_names() == (
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
    )  # fmt: skip
    inputs = text(3, 9)
    with torch.no_grad():
        expected = model(**inputs, past_key_values=transformers.DynamicCache())
    outputs = sweep(view, inputs)
    torch.testing.assert_close(outputs["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    keys = expected.past_key_values.layers[1].keys
    torch.testing.assert_close(outputs["present.1.key"], keys, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model), "the module is left as it was"


def test_flags_are_bound_and_a_cache_is_given_in_its_tensors() -> None:
    model = made("LlamaForCausalLM", "LlamaConfig", **TEXT)
    plain = trace(model, kwargs=text(2, 7) | {"use_cache": False, "position_ids": None})
    assert plain.output_names() == ("logits",)
    cache = transformers.DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8), layer)
    step = {"input_ids": text(2, 3)["input_ids"], "attention_mask": text(2, 8)["attention_mask"]}
    view = trace(model, kwargs=step | {"past_key_values": cache})
    assert view.input_names()[2:4] == ("past_key_values.0.key", "past_key_values.0.value")
    assert str(view.type(view.inputs()[2])) == "f32[batch, 1, past, 8]"
    whole = text(3, 9)
    expected = sweep(plain, whole)["logits"]
    first = sweep(view, {n: t[:, :6] for n, t in whole.items()})
    past = {n.replace("present", "past_key_values"): t for n, t in first.items() if n != "logits"}
    last = {"input_ids": whole["input_ids"][:, 6:], "attention_mask": whole["attention_mask"]}
    logits = sweep(view, last | past)["logits"]
    torch.testing.assert_close(logits, expected[:, 6:], rtol=1e-5, atol=1e-5)
    assert view.source.original is not None
    run = view.source.original.start()
    torch.testing.assert_close(run(last | past)["logits"], logits, rtol=1e-5, atol=1e-5)
    assert run(whole)["logits"].shape == (3, 9, 50), "without a cache, as at the start of a text"


def test_an_encoder_decoder_gives_both_of_its_caches() -> None:
    model = made("BartForConditionalGeneration", "BartConfig", **BART)
    ids = text(2, 4)["input_ids"]
    view = trace(model, kwargs=text(2, 7) | {"decoder_input_ids": ids})
    inputs = text(3, 9) | {"decoder_input_ids": text(3, 5)["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs)
    outputs = sweep(view, inputs)
    torch.testing.assert_close(outputs["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert outputs["present.0.decoder.key"].shape[2] == 5
    assert outputs["present.0.encoder.value"].shape[2] == 9
    hidden = expected.encoder_last_hidden_state
    torch.testing.assert_close(outputs["encoder_last_hidden_state"], hidden, rtol=1e-5, atol=1e-5)


@dataclass
class Out:
    scaled: Tensor
    parts: tuple[Tensor, ...]
    note: str


class Net(nn.Module):
    def forward(self, x: Tensor, /, factor: float, *, shift: Tensor | None = None) -> Out:
        return Out(x * factor, (x + (0 if shift is None else shift), x - 1), "nothing")


def test_outputs_of_any_class_go_by_their_names() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, factor: float) -> Out:
            out: Out = Net()(x, factor)
            return out

    view = trace(Named(), (torch.ones(2, 3), 2.0))
    assert (view.input_names(), view.output_names()) == (("x",), ("scaled", "parts.0", "parts.1"))
    outputs = sweep(view, {"x": torch.full((5, 3), 4.0)})
    assert [float(t.mean()) for t in outputs.values()] == [8.0, 4.0, 3.0]


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Tensor]


@pytest.mark.parametrize(
    ("make", "names"),
    [(lambda x: Pair(x, {"a": x + 1}), ("first", "rest.a")),
     (lambda x: {"first": x, "rest": (x + 1, [x + 2])}, ("first", "rest.0", "rest.1.0"))],
)  # fmt: skip
def test_outputs_that_hold_others_go_by_their_names(make: Any, names: tuple[str, ...]) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return make(x * 2)

    assert trace(Net(), torch.ones(2, 3)).output_names() == names


def test_what_is_no_tensor_needs_a_name_to_be_bound_by() -> None:
    with pytest.raises(BadInput, match="the input x is not a tensor, and has no name to be bound"):
        trace(Net(), (3.0, 2.0), {"shift": torch.ones(1)})


class Gathers(nn.Module):
    """As wrappers of other libraries do: what it is given goes on as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Named(nn.Module):
    def forward(self, x: Tensor, shift: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor + shift


@pytest.mark.parametrize("positional", [True, False])
def test_a_wrapper_that_gathers_its_arguments(positional: bool) -> None:
    inputs = {"x": torch.ones(2, 3), "shift": torch.full((2, 3), 5.0)}
    args = (inputs.pop("x"),) if positional else ()
    view = trace(Gathers(), args, {**inputs, "factor": 2.0})
    assert view.input_names()[-1] == "shift"
    one, two = torch.full((5, 3), 4.0), torch.ones(5, 3)
    (output,) = sweep(view, dict(zip(view.input_names(), (one, two), strict=True))).values()
    torch.testing.assert_close(output, one * 2 + two)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: None, "this is a NoneType: give the module itself"),
        (lambda: "model", r"this is a str: gw.load\(NAME\) takes names"),
        (lambda: Named, r"this is a class: make one first: Named\(...\)"),
        (lambda: torch.relu, "call it from the forward of a module"),
        (lambda: torch.jit.script(nn.ReLU()), "trace the module that it was scripted from"),
        (lambda: torch.export.export(nn.ReLU(), (torch.ones(2),)), r"torch.export.save\(it, 'mod"),
    ],
)
def test_what_is_no_module_is_told_what_to_do(module: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        trace(module(), (torch.ones(2),))


@pytest.mark.parametrize(
    ("args", "message"),
    [(3, "args is a int, and must be a tensor"), ({"x": 1}, "inputs by name go into kwargs=")],
)
def test_arguments_are_a_tuple(args: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        trace(Named(), args)
