"""Folders of diffusers: the graph is the library's own model, for each of the classes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graphwright.ir.canonical.families import canonicalize
from graphwright.ir.core.errors import BadInput, Missing
from graphwright.ir.load import diffusers_folder
from graphwright.ir.load.sources import load
from graphwright.ir.run.inputs import sample_inputs
from graphwright.ir.run.sweep import sweep
from graphwright.ir.run.truth import ask_source
from graphwright.ir.run.verify import compare
from graphwright.ir.structure.recognize import recognize
from graphwright.tools.bench.families import save
from graphwright.tools.bench.family_models import FAMILIES
from safetensors.torch import load_file, save_file

EXACT = 2e-5
WEIGHTS = "diffusion_pytorch_model.safetensors"


def exact(folder: Path, **options: Any) -> Any:
    """Load a folder, and hold the graph against the library on a sample and on other sizes."""
    view = load(folder, **options)
    truth = ask_source(view, [sample_inputs(view)])
    assert len(truth.samples) == len(truth.probes) == 1
    for sample in (*truth.samples, *truth.probes):
        errors = compare(sample.outputs, sweep(view, sample.inputs))
        assert all(error.within(EXACT) for error in errors.values()), (sample.what, errors)
    return view


def blocks_of(view: Any) -> int:
    """How many one stream runs around. Flux has such where it has two single layers or more: the
    stream of its joint layer is longer than one alone."""
    canonicalize(view)
    return len(recognize(view).blocks)


ONE_LEVEL: dict[str, Any] = {"block_out_channels": [16]}
SMALLER: dict[str, dict[str, Any]] = {
    "unet-xl": ONE_LEVEL | {
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "dit": {"num_layers": 1},
    "flux": {"num_single_layers": 1},
    "autoencoder": ONE_LEVEL | {
        "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
    },
}  # fmt: skip
"""What makes a family's model small: of SD3 the last layer differs from those before."""


def saved(name: str, folder: Path) -> Path:
    family = FAMILIES[name]
    save(replace(family, sizes={**family.sizes, **SMALLER.get(name, {})}), folder)
    return folder


STEP = ("encoder_hidden_states", "pooled_projections", "timestep")


@pytest.mark.parametrize(
    ("name", "blocks", "inputs"),
    [
        ("unet-xl", 0, ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")),
        ("dit", 1, ("hidden_states", "timestep", "class_labels")),
        ("sd3", 0, ("hidden_states", *STEP)),
        ("flux", 0, ("hidden_states", *STEP, "img_ids", "txt_ids", "guidance")),
    ],
)
def test_a_step_is_the_library_s(
    name: str, blocks: int, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    view = exact(saved(name, tmp_path))
    assert view.input_names() == inputs
    assert blocks_of(view) == blocks


def test_an_autoencoder_and_its_halves(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    saved("autoencoder", tmp_path)
    # Attention is called as it was before 0.18.
    tensors = load_file(tmp_path / WEIGHTS)
    names = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]
    for today, before in names:
        tensors = {key.replace(today, before): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert not blocks_of(exact(tmp_path))
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    image = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder, decoder = (load(tmp_path, part=part) for part in ("encoder", "decoder"))
    assert sum(w.nbytes for w in encoder.weights().values()) < 4 * sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        latents = model.encode(image).latent_dist
        images = model.decode(latents.mean).sample
    parameters = sweep(encoder, {"sample": image})["latent_parameters"]
    torch.testing.assert_close(parameters, latents.parameters, rtol=1e-4, atol=1e-5)
    decoded = sweep(decoder, {"latent_sample": latents.mean})["sample"]
    torch.testing.assert_close(decoded, images, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="no part 'decode'; did you mean decoder"):
        load(tmp_path, part="decode")


# --- refusals, which need no package --------------------------------------------------------------


def test_a_pipeline_and_a_class_that_is_not_known(tmp_path: Path) -> None:
    for name in ("unet", "vae", "feature_extractor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BadInput, match=r"several models \(unet, vae\).* its folder, as .*/unet"):
        load(tmp_path)
    with pytest.raises(BadInput, match="did you mean UNet2DConditionModel"):
        load(tmp_path / "unet")
    with pytest.raises(BadInput, match="has no cache of keys and values"):
        load(tmp_path / "unet", cache=True)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(Missing, match=r"pip install 'graphwright\[diffusers\]'"):
        diffusers_folder.load_diffusers(tmp_path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    saved("dit", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = dict(list(tensors.items())[1:])
    save_file(lost, tmp_path / WEIGHTS)
    with pytest.raises(BadInput, match="1 of the model's weights are not in the checkpoint"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 5}))
    with pytest.raises(BadInput, match="the config asks for"):
        load(tmp_path)
    timed = {"_class_name": "UNet2DConditionModel", "class_embed_type": "timestep"}
    for changed, reason in (
        ({**FAMILIES["unet"].sizes, **timed}, "with class_embed_type='timestep' takes inputs that"),
        (config | {"num_attention_heads": "many"}, "cannot be built from its config.json"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput, match=reason):
            load(tmp_path, allow_missing_weights=True)
