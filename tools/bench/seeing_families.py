"""Small models that name, enlarge, compare or read what is in an image or a film.

As those of ``family_models``: random weights, few layers a stack.
"""

from __future__ import annotations

from collections.abc import Mapping

from .family_table import LAYERS, Family

_BODY = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
_VISION = _BODY | {"intermediate_size": 64, "image_size": 16, "patch_size": 4}
_TEXT = _BODY | {"vocab_size": 97, "max_position_embeddings": 64, "intermediate_size": 64,
                 "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_PVT = {"image_size": 32, "num_encoder_blocks": 2, "depths": [2, 2], "hidden_sizes": [16, 32],
        "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}  # fmt: skip

SEEING: Mapping[str, Family] = {
    "pvt": Family("PvtForImageClassification", "PvtConfig", _PVT | {
        "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]}, blocks=(2, 2)),
    "pvt-v2": Family("PvtV2ForImageClassification", "PvtV2Config", _PVT | {
        "sr_ratios": [2, 1], "patch_sizes": [7, 3]}, blocks=(2, 2)),
    "hiera": Family("HieraForImageClassification", "HieraConfig", {
        "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2],
        "patch_padding": [1, 1], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4],
        "mlp_ratio": 2.0, "query_stride": [2, 2], "masked_unit_size": [4, 4], "num_query_pool": 2,
        "masked_unit_attention": [True, True, False]}, blocks=(1, 1, 1)),
    "dinov3-convnext": Family("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {
        "hidden_sizes": [16, 24, 24, 24], "depths": [1] * 4, "image_size": 32},
        blocks=(1, 1, 1, 1), sites=0),
    "bit": Family("BitForImageClassification", "BitConfig", {
        "image_size": 32, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2],
        "num_groups": 4}, blocks=(1, 2), sites=0),
    "mgp-str": Family("MgpstrForSceneTextRecognition", "MgpstrConfig", _VISION | {
        "image_size": [16, 32], "max_token_length": 5, "num_character_labels": 8,
        "num_bpe_labels": 20, "num_wordpiece_labels": 20, "mlp_ratio": 2.0}),
    "swin2sr": Family("Swin2SRForImageSuperResolution", "Swin2SRConfig", {
        "image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}),
    "ijepa": Family("IJepaForImageClassification", "IJepaConfig", _VISION),
    "vjepa2": Family("VJEPA2ForVideoClassification", "VJEPA2Config", {
        "patch_size": 4, "crop_size": 16, "frames_per_clip": 4, "hidden_size": 32,
        "num_attention_heads": 4, "num_hidden_layers": LAYERS, "num_pooler_layers": 1,
        "mlp_ratio": 2, "pred_hidden_size": 32, "pred_num_attention_heads": 4,
        "pred_num_hidden_layers": 1}, blocks=(LAYERS + 1,), sites=LAYERS + 2),
    "bridgetower": Family("BridgeTowerModel", "BridgeTowerConfig", {
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
        "text_config": _TEXT | {"num_hidden_layers": 3, "type_vocab_size": 1},
        "vision_config": {
            "hidden_size": 64, "num_hidden_layers": 3, "patch_size": 4, "image_size": 16}},
        blocks=(3, 3, LAYERS, LAYERS), sites=6 + 4 * LAYERS),
    "x-clip": Family("XCLIPModel", "XCLIPConfig", {
        "text_config": _TEXT, "vision_config": _VISION | {
            "num_frames": 4, "mit_hidden_size": 32, "mit_intermediate_size": 64,
            "mit_num_attention_heads": 4},
        "projection_dim": 32, "prompt_num_attention_heads": 4},
        blocks=(LAYERS, LAYERS, 1, LAYERS), sites=4 * LAYERS + 1),
}  # fmt: skip
