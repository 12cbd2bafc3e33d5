"""Small models of more families that see: beside a text, inside of one, or alone.

As those of ``family_models``: random weights, two layers a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family_table import LAYERS, Family

_BODY = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _BODY | _ENDS | {"vocab_size": 97, "max_position_embeddings": 64, "intermediate_size": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 8}
_VISION = _BODY | {"intermediate_size": 64, "image_size": 16, "patch_size": 4}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP = _VISION | {"model_type": "clip_vision_model", "projection_dim": 24}
_PIXTRAL = _VISION | {"model_type": "pixtral", "image_size": [16, 24]}
_LLAMA = _GROUPED | {"model_type": "llama"}
_MISTRAL = _HEADED | {"model_type": "mistral"}
_QWEN = _GROUPED | {"model_type": "qwen2"}
_COHERE = _GROUPED | {"model_type": "cohere2", "sliding_window": 4}
_SAM = _VISION | {"image_size": 32, "output_channels": 16, "window_size": 3,
                  "global_attn_indexes": [1], "mlp_dim": 64}  # fmt: skip


_SIGLIP2 = _BODY | {"intermediate_size": 64, "patch_size": 4, "num_patches": 16}
_QWEN3_VISION = {
    "depth": LAYERS, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64,
    "image_size": [16, 24], "num_position_embeddings": 25,
}  # fmt: skip
_QWEN_WORDS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94,
               "vision_end_token_id": 93}  # fmt: skip
_TURNED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
           "partial_rotary_factor": 1.0}  # fmt: skip
_LINEAR = _HEADED | {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4, "rope_parameters": _TURNED,
}  # fmt: skip
_GLM_VISION = {"depth": LAYERS, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
               "temporal_patch_size": 2, "hidden_size": 32, "out_hidden_size": 32,
               "intermediate_size": 48, "image_size": 16}  # fmt: skip
_GLM_WORDS = dict(zip(
    ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id",
     "video_start_token_id", "video_end_token_id"), range(96, 90, -1), strict=True,
))  # fmt: skip
_GEMMA4_VISION = _BODY | {
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64, "patch_size": 4,
    "pooling_kernel_size": 2, "position_embedding_size": 16, "image_size": [16, 24],
}  # fmt: skip
_GEMMA4 = _HEADED | {
    "num_hidden_layers": 4, "global_head_dim": 16, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
_GEMMA4_WORDS = {"image_token_id": 96, "video_token_id": 95, "audio_token_id": 94,
                 "boi_token_id": 93, "eoi_token_id": 92}  # fmt: skip
_LOOKING = {"text_config": _TEXT | {"max_position_embeddings": 16}, "vision_config": _VISION,
            "projection_dim": 32}  # fmt: skip
_BLIP = {"text_config": _TEXT | {"encoder_hidden_size": 32, "projection_dim": 24},
         "vision_config": _VISION | {"projection_dim": 24}, "projection_dim": 24}  # fmt: skip
_BOTH = (LAYERS, LAYERS)


def _seeing(name: str, sizes: Mapping[str, Any], **facts: Any) -> Family:
    """A model that writes about images, whose config is named as it is."""
    told: dict[str, Any] = {"blocks": _BOTH, "cache": True, **facts}
    return Family(f"{name}ForConditionalGeneration", f"{name}Config", sizes, **told)


def _reading(encoder: Mapping[str, Any], decoder: Mapping[str, Any], **facts: Any) -> Family:
    """A model that writes what an image says, of an encoder and a decoder put together."""
    cross = {"is_decoder": True, "add_cross_attention": True}
    sizes = {"encoder": encoder, "decoder": {**decoder, **cross}, "decoder_start_token_id": 2,
             "pad_token_id": 1}  # fmt: skip
    told: dict[str, Any] = {"blocks": _BOTH, "sites": 3 * LAYERS, "cache": True, **facts}
    return Family("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", sizes, **told)


MORE_VISION: Mapping[str, Family] = {
    "dinov2-registers": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _VISION | {
        "mlp_ratio": 2, "num_register_tokens": 2}),
    "dinov3": Family("DINOv3ViTModel", "DINOv3ViTConfig", _VISION | {"num_register_tokens": 2}),
    "aimv2": Family("Aimv2VisionModel", "Aimv2VisionConfig", _VISION, sites=LAYERS + 1),
    "siglip2": Family("Siglip2Model", "Siglip2Config", {
        "text_config": _TEXT | {"projection_size": 32}, "vision_config": _SIGLIP2}, blocks=_BOTH,
        sites=2 * LAYERS + 1),
    "siglip2-vision": Family("Siglip2VisionModel", "Siglip2VisionConfig", _SIGLIP2 | {
        "image_size": [12, 20]}, sites=LAYERS + 1),
    "chinese-clip": Family("ChineseCLIPModel", "ChineseCLIPConfig", {
        "text_config": _TEXT, "vision_config": _VISION | {"projection_dim": 24},
        "projection_dim": 24}, blocks=_BOTH),
    "swinv2": Family("Swinv2Model", "Swinv2Config", {
        "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "window_size": 4}, blocks=_BOTH),
    "convnextv2": Family("ConvNextV2ForImageClassification", "ConvNextV2Config", {
        "hidden_sizes": [16, 24], "depths": [2, 2], "num_stages": 2}, blocks=_BOTH, sites=0),
    "depth-anything": Family("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {
        "backbone_config": _VISION | {
            "model_type": "dinov2", "mlp_ratio": 2, "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False, "apply_layernorm": True},
        "depth_estimation_type": "metric", "max_depth": 10, "reassemble_hidden_size": 32,
        "patch_size": 4, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
        "reassemble_factors": [4, 2, 1, 0.5], "head_hidden_size": 8}, blocks=(4,)),
    "vitpose": Family("VitPoseForPoseEstimation", "VitPoseConfig", {
        "backbone_config": _BODY | {
            "model_type": "vitpose_backbone", "image_size": [32, 24], "patch_size": [8, 8],
            "mlp_ratio": 2, "out_indices": [2]}, "num_labels": 5}),
    "sam-vision": Family("SamVisionModel", "SamVisionConfig", _SAM | {"num_pos_feats": 8}),
    "clipseg": Family("CLIPSegForImageSegmentation", "CLIPSegConfig", {
        "text_config": _TEXT | {"projection_dim": 24},
        "vision_config": _VISION | {"num_hidden_layers": 3}, "projection_dim": 24,
        "extract_layers": [1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 32}, blocks=(LAYERS + 1, LAYERS, LAYERS)),
    "owlvit": Family("OwlViTForObjectDetection", "OwlViTConfig", _LOOKING, blocks=_BOTH),
    "owlv2": Family("Owlv2ForObjectDetection", "Owlv2Config", _LOOKING, blocks=_BOTH),
    "blip": Family("BlipForConditionalGeneration", "BlipConfig", _BLIP, blocks=_BOTH,
                   sites=3 * LAYERS),
    "blip-itm": Family("BlipForImageTextRetrieval", "BlipConfig", _BLIP, blocks=_BOTH,
                       sites=3 * LAYERS),
    "git": Family("GitForCausalLM", "GitConfig", _TEXT | {"vision_config": _VISION}, blocks=_BOTH),
    "trocr": _reading(_VISION | {"model_type": "deit"}, _ENDS | {
        "model_type": "trocr", "vocab_size": 97, "d_model": 32, "decoder_layers": LAYERS,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64}),
    "donut": _reading({
        "model_type": "donut-swin", "image_size": [16, 16], "patch_size": 2, "embed_dim": 16,
        "depths": [2], "num_heads": [2], "window_size": 4}, _ENDS | {
        "model_type": "mbart", "vocab_size": 97, "d_model": 16, "decoder_layers": LAYERS,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
        "is_encoder_decoder": False}),
    "vit-gpt2": _reading(_VISION | {"model_type": "vit"}, _ENDS | {
        "model_type": "gpt2", "n_layer": LAYERS, "n_embd": 32, "n_head": 4, "vocab_size": 97,
        "n_positions": 64}),
    "videomae": Family("VideoMAEModel", "VideoMAEConfig", _VISION | {"num_frames": 4}),
    "timesformer": Family("TimesformerModel", "TimesformerConfig", _VISION | {"num_frames": 4},
                          blocks=(), sites=2 * LAYERS),
    "vivit": Family("VivitModel", "VivitConfig", _VISION | {
        "num_frames": 4, "tubelet_size": [2, 4, 4]}),
}  # fmt: skip

MORE_IMAGES_AND_TEXT: Mapping[str, Family] = {
    "gemma3-vl": _seeing("Gemma3", {
        "vision_config": _SIGLIP, "text_config": _HEADED | {
            "model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "full_attention"]},
        "mm_tokens_per_image": 4, "image_token_index": 96, "boi_token_index": 95,
        "eoi_token_index": 94}),
    "internvl": _seeing("InternVL", {
        "vision_config": _VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        "text_config": _QWEN, "image_token_id": 96}),
    "mistral3": _seeing("Mistral3", {
        "vision_config": _PIXTRAL, "text_config": _MISTRAL, "image_token_index": 96,
        "vision_feature_layer": -1, "spatial_merge_size": 2}),
    "pixtral": _seeing("Llava", {
        "vision_config": _PIXTRAL | {"image_size": [8, 12]}, "text_config": _MISTRAL,
        "image_token_index": 96, "vision_feature_layer": -1, "image_seq_length": 1,
        "vision_feature_select_strategy": "full"}),
    "lighton-ocr": _seeing("LightOnOcr", {
        "vision_config": _PIXTRAL, "text_config": _HEADED | {"model_type": "qwen3"},
        "image_token_id": 96, "spatial_merge_size": 2}),
    "phi4-multimodal": Family("Phi4MultimodalForCausalLM", "Phi4MultimodalConfig", _HEADED | {
        "original_max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "image_grid_pinpoints": [[8, 16]],
        "vision_config": _VISION | {"num_hidden_layers": 3, "image_size": 8, "crop_size": 8,
                                    "patch_size": 2, "image_token_id": 96},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8, "audio_token_id": 95, "input_size": 16}},
        blocks=_BOTH, cache=True),
    "vipllava": _seeing("VipLlava", {
        "vision_config": _CLIP | {"num_hidden_layers": 3}, "text_config": _LLAMA,
        "image_token_index": 96, "vision_feature_layer": [-2, -3]}),
    "aya-vision": _seeing("AyaVision", {
        "vision_config": _SIGLIP, "text_config": _COHERE, "image_token_index": 96}),
    "cohere2-vision": _seeing("Cohere2Vision", {
        "vision_config": _SIGLIP, "text_config": _COHERE, "image_token_id": 96,
        "alignment_intermediate_size": 48}),
    "ovis2": _seeing("Ovis2", {
        "vision_config": _VISION | {
            "vocab_size": 24, "hidden_stride": 2, "num_visual_indicator_tokens": 2},
        "text_config": _QWEN, "image_token_id": 96, "visual_indicator_token_ids": [94, 95],
        "vocab_size": 97, "hidden_size": 32}),
    "deepseek-vl": _seeing("DeepseekVL", {
        "vision_config": _SIGLIP, "text_config": _LLAMA, "image_token_id": 96}),
    "janus": _seeing("Janus", {
        "vision_config": _VISION | {
            "model_type": "janus_vision_model", "projection_dim": 32, "mlp_ratio": 2},
        "text_config": _LLAMA, "image_token_id": 96, "vq_config": {
            "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "embed_dim": 4,
            "num_embeddings": 8, "latent_channels": 32, "projection_dim": 32,
            "image_token_embed_dim": 32, "num_patches": 4}}),
    "granite-vision": _seeing("LlavaNext", {
        "vision_config": _SIGLIP, "text_config": _GROUPED | {
            "model_type": "granite", "max_position_embeddings": 256},
        "image_token_index": 96, "image_seq_length": 16, "vision_feature_layer": [-2, -1],
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}),
    "florence2": _seeing("Florence2", {
        "vision_config": {
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4],
            "num_groups": [2, 4], "window_size": 2, "projection_dim": 32, "image_size": 24,
            "max_position_embeddings": 8},
        "text_config": _ENDS | {
            "model_type": "bart", "vocab_size": 97, "d_model": 32, "encoder_layers": LAYERS,
            "decoder_layers": LAYERS, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
            "decoder_start_token_id": 2},
        "image_token_id": 96}, blocks=(1, 1, 1, 1, LAYERS, LAYERS), sites=4 + 3 * LAYERS,
        cache=False),
    "lfm2-vl": _seeing("Lfm2Vl", {
        "vision_config": _SIGLIP2 | {
            "model_type": "siglip2_vision_model", "image_size": [24, 16], "vision_use_head": False},
        "text_config": _GROUPED | {
            "model_type": "lfm2", "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False},
        "image_token_id": 96, "projector_hidden_size": 48}, sites=LAYERS + 1),
    "qwen3.5-vl": _seeing("Qwen3_5", {
        "vision_config": _QWEN3_VISION, "text_config": _LINEAR, **_QWEN_WORDS}, sites=LAYERS + 1),
    "qwen3.5-moe-vl": _seeing("Qwen3_5Moe", {
        "vision_config": _QWEN3_VISION, "text_config": _LINEAR | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32}, **_QWEN_WORDS}, sites=LAYERS + 1),
    "gemma4-vl": _seeing("Gemma4", {
        "vision_config": _GEMMA4_VISION | {"standardize": True}, "text_config": _GEMMA4 | {
            "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision"},
        **_GEMMA4_WORDS}, blocks=(LAYERS, 4), sites=6),
    "gemma4-e2b-vl": _seeing("Gemma4", {
        "vision_config": _GEMMA4_VISION | {"use_clipped_linears": True}, "text_config": _GEMMA4 | {
            "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8}, **_GEMMA4_WORDS}, blocks=(LAYERS, 4), sites=6),
    "llama4-vl": _seeing("Llama4", {
        "vision_config": _VISION | {
            "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32,
            "vision_output_dim": 32}, "text_config": _HEADED | {
            "model_type": "llama4_text", "num_local_experts": 4, "intermediate_size_mlp": 64,
            "attention_chunk_size": 64, "interleave_moe_layer_step": 2, "moe_layers": [1]},
        "image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}),
    "idefics2": _seeing("Idefics2", {
        "vision_config": _VISION, "text_config": _MISTRAL, "image_token_id": 96,
        "perceiver_config": {
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1,
            "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}},
        blocks=(LAYERS, 1, LAYERS), sites=2 * LAYERS + 1),
    "aria": _seeing("Aria", {
        "vision_config": _VISION | {"model_type": "idefics3_vision"}, "text_config": _HEADED | {
            "model_type": "aria_text", "moe_num_experts": 4, "moe_topk": 2,
            "moe_num_shared_experts": 1},
        "image_token_index": 96, "projector_patch_to_query_dict": {16: 4}}, sites=2 * LAYERS + 1),
    "llava-next-video": _seeing("LlavaNextVideo", {
        "vision_config": _CLIP, "text_config": _LLAMA | {"max_position_embeddings": 256},
        "image_token_index": 96, "video_token_index": 95, "image_seq_length": 16,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}, blocks=(1, LAYERS), sites=3),
    "glm-4.5v": _seeing("Glm4vMoe", {
        "vision_config": _GLM_VISION, "text_config": _HEADED | {
            "rope_parameters": _TURNED, "moe_intermediate_size": 32, "n_routed_experts": 4,
            "num_experts_per_tok": 2}, **_GLM_WORDS}),
    "glm-ocr": _seeing("GlmOcr", {
        "vision_config": _GLM_VISION, "text_config": _GROUPED | {"rope_parameters": _TURNED},
        **_GLM_WORDS}),
    "got-ocr2": _seeing("GotOcr2", {
        "vision_config": _SAM, "text_config": _QWEN, "image_token_index": 96}),
}  # fmt: skip
