"""Small models of many families, by transformers' names: what ``families`` judges.

Each has random weights, two layers a stack, and widths of a few dozens: what is judged is how a
family is written, not what it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family_table import LAYERS, Family, causal
from .image_families import MORE_IMAGES_AND_TEXT, MORE_VISION
from .seeing_families import SEEING
from .text_families import MORE_DECODERS, MORE_ENCODERS, MORE_PAIRS, MORE_SPEECH

_BODY = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
_WORDS = {"vocab_size": 97, "max_position_embeddings": 64, "intermediate_size": 64}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _BODY | _WORDS | _ENDS
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 8}
_WINDOWED = _HEADED | {"sliding_window": 4, "query_pre_attn_scalar": 10}
_GPT2 = {"n_layer": LAYERS, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 64} | _ENDS
_GPTJ = _GPT2 | {"rotary_dim": 4, "n_inner": 64}
_OPT = _BODY | _ENDS | {"vocab_size": 97, "max_position_embeddings": 64, "ffn_dim": 64,
                        "word_embed_proj_dim": 32}  # fmt: skip
_MPT = {"n_layers": LAYERS, "d_model": 32, "n_heads": 4, "vocab_size": 97, "max_seq_len": 64,
        "expansion_ratio": 2} | _ENDS  # fmt: skip
_BLOOM = {"n_layer": LAYERS, "hidden_size": 32, "n_head": 4, "vocab_size": 97} | _ENDS
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "num_local_experts": 4}  # fmt: skip
_DEEPSEEK = _TEXT | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip
_LINEAR = _HEADED | {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
           "mamba_expand": 2, "mamba_chunk_size": 8}  # fmt: skip
_T5 = {"num_layers": LAYERS, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64,
       "vocab_size": 97, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
_BART = {
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "d_model": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97,
    "max_position_embeddings": 64, "decoder_start_token_id": 2,
} | _ENDS  # fmt: skip
_MARIAN = _BART | {"pad_token_id": 96, "decoder_start_token_id": 96, "decoder_vocab_size": 97}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
_VISION = _BODY | {"intermediate_size": 64, "image_size": 16, "patch_size": 4}
_STAGES = {"hidden_sizes": [16, 24], "depths": [2, 2], "num_stages": 2, "embedding_size": 16}
_DETECTION: dict[str, Any] = {
    "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "num_queries": 5, "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": _STAGES
    | {"model_type": "resnet", "layer_type": "basic", "out_features": ["stage2"]},
}  # fmt: skip
_SPEECH = _BODY | {
    "intermediate_size": 64, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (10, 3),
    "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 4, "codevector_dim": 8,
    "mask_time_prob": 0.0,
} | _ENDS  # fmt: skip
_CLIP_VISION = _VISION | {"model_type": "clip_vision_model", "projection_dim": 24}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model"}
_CLIP = {"text_config": _TEXT | {"projection_dim": 24}, "vision_config": _CLIP_VISION,
         "projection_dim": 24}  # fmt: skip
_LLAMA = _GROUPED | {"model_type": "llama"}
_QWEN = _GROUPED | {"model_type": "qwen2"}
_TURNED = {"rope_parameters": {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}  # fmt: skip
_QWEN_VISION = {"depth": LAYERS, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
                "temporal_patch_size": 2}  # fmt: skip
_QWEN3_VISION = _QWEN_VISION | {
    "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "image_size": [16, 24],
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0]}  # fmt: skip
_QWEN_WORDS = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94,
               "vision_end_token_id": 93}  # fmt: skip
_BOTH = (LAYERS, LAYERS)
def _pair(model: str, config: str, sizes: Mapping[str, Any]) -> Family:
    """An encoder and a decoder, which looks at itself and at the encoder."""
    return Family(model, config, sizes, blocks=_BOTH, sites=3 * LAYERS, cache=True)


def _encoder(name: str, sizes: Mapping[str, Any] = _TEXT, **facts: Any) -> Family:
    return Family(f"{name}Model", f"{name}Config", sizes, **facts)


_GEMMA4 = _WINDOWED | {
    "num_hidden_layers": 4, "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
DECODERS: Mapping[str, Family] = {
    "llama": causal("LlamaForCausalLM", _GROUPED),
    "llama-dynamic": causal("LlamaForCausalLM", _GROUPED | {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "llama-yarn": causal("LlamaForCausalLM", _GROUPED | {
        "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0,
                            "original_max_position_embeddings": 32}}),
    "phi3-longrope": causal("Phi3ForCausalLM", _GROUPED | {
        "original_max_position_embeddings": 8, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [2.0] * 4,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "original_max_position_embeddings": 8}}),
    "mistral": causal("MistralForCausalLM", _GROUPED | {"sliding_window": 4}),
    "qwen2": causal("Qwen2ForCausalLM", _GROUPED),
    "qwen3": causal("Qwen3ForCausalLM", _HEADED),
    "gemma": causal("GemmaForCausalLM", _HEADED),
    "gemma2": causal("Gemma2ForCausalLM", _WINDOWED),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _WINDOWED, cache=True),
    "phi": causal("PhiForCausalLM", _TEXT),
    "phi3": causal("Phi3ForCausalLM", _GROUPED),
    "gpt2": causal("GPT2LMHeadModel", _GPT2),
    "gpt-neo": causal("GPTNeoForCausalLM", _TEXT | {
        "num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 4}),
    "gpt-neox": causal("GPTNeoXForCausalLM", _TEXT),
    "gptj": causal("GPTJForCausalLM", _GPTJ),
    "codegen": causal("CodeGenForCausalLM", _GPTJ),
    "gpt-bigcode": causal("GPTBigCodeForCausalLM", _GPT2),
    "starcoder2": causal("Starcoder2ForCausalLM", _GROUPED),
    "opt": causal("OPTForCausalLM", _OPT),
    "xglm": causal("XGLMForCausalLM", {
        "num_layers": LAYERS, "d_model": 32, "attention_heads": 4, "ffn_dim": 64, "vocab_size": 97,
        "max_position_embeddings": 64} | _ENDS),
    "biogpt": causal("BioGptForCausalLM", _TEXT),
    "stablelm": causal("StableLmForCausalLM", _GROUPED),
    "persimmon": causal("PersimmonForCausalLM", _TEXT),
    "olmo": causal("OlmoForCausalLM", _GROUPED),
    "olmo2": causal("Olmo2ForCausalLM", _GROUPED),
    "cohere": causal("CohereForCausalLM", _GROUPED),
    "granite": causal("GraniteForCausalLM", _GROUPED),
    "glm4": causal("Glm4ForCausalLM", _HEADED),
    "smollm3": causal("SmolLM3ForCausalLM", _GROUPED),
    "nemotron": causal("NemotronForCausalLM", _HEADED),
    "ernie4.5": causal("Ernie4_5ForCausalLM", _HEADED),
    "bloom": causal("BloomForCausalLM", _BLOOM),
    "mpt": causal("MptForCausalLM", _MPT),
    "falcon": causal("FalconForCausalLM", _TEXT | {"multi_query": True}),
    "falcon-40b": causal("FalconForCausalLM", _TEXT | {
        "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gpt-oss": causal("GptOssForCausalLM", _HEADED | _EXPERTS | {"sliding_window": 4}),
    "mixtral": causal("MixtralForCausalLM", _GROUPED | _EXPERTS),
    "qwen2-moe": causal("Qwen2MoeForCausalLM", _GROUPED | _EXPERTS | {
        "shared_expert_intermediate_size": 32}),
    "qwen3-moe": causal("Qwen3MoeForCausalLM", _HEADED | _EXPERTS),
    "olmoe": causal("OlmoeForCausalLM", _GROUPED | _EXPERTS),
    "deepseek-v3": causal("DeepseekV3ForCausalLM", _DEEPSEEK),
    "deepseek-v2": causal("DeepseekV2ForCausalLM", _DEEPSEEK),
    "llama4": Family("Llama4ForCausalLM", "Llama4TextConfig", _HEADED | {
        "num_local_experts": 4, "intermediate_size_mlp": 64, "attention_chunk_size": 4,
        "interleave_moe_layer_step": 2, "moe_layers": [1]}, cache=True),
    "gemma3n": Family("Gemma3nForCausalLM", "Gemma3nTextConfig", _WINDOWED | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [64] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "altup_num_inputs": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
        blocks=(4,), sites=4, cache=True),
    "gemma4": Family("Gemma4ForCausalLM", "Gemma4TextConfig", _GEMMA4 | {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        blocks=(4,), sites=4, cache=True),
    "gemma4-e2b": Family("Gemma4ForCausalLM", "Gemma4TextConfig", _GEMMA4 | {
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8}, blocks=(4,), sites=4, cache=True),
    "granite-moe": causal("GraniteMoeForCausalLM", _GROUPED | _EXPERTS),
    "phimoe": causal("PhimoeForCausalLM", _GROUPED | _EXPERTS),
    "glm4-moe": causal("Glm4MoeForCausalLM", _HEADED | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "ernie4.5-moe": causal("Ernie4_5_MoeForCausalLM", _HEADED | {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "olmo3": causal("Olmo3ForCausalLM", _GROUPED | {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
    "exaone4": causal("Exaone4ForCausalLM", _GROUPED | {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
    "cohere2": causal("Cohere2ForCausalLM", _HEADED | {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
    "apertus": causal("ApertusForCausalLM", _GROUPED),
    "bitnet": causal("BitNetForCausalLM", _GROUPED),
    "seed-oss": causal("SeedOssForCausalLM", _HEADED),
    "hunyuan": causal("HunYuanDenseV1ForCausalLM", _HEADED),
    "mamba": Family("MambaForCausalLM", "MambaConfig", {
        "num_hidden_layers": LAYERS, "hidden_size": 32, "state_size": 4, "vocab_size": 97} | _ENDS,
        sites=0),
    "mamba2": Family("Mamba2ForCausalLM", "Mamba2Config", {
        "num_hidden_layers": LAYERS, "hidden_size": 32, "state_size": 8, "num_heads": 4,
        "head_dim": 16, "n_groups": 1, "chunk_size": 8, "vocab_size": 97} | _ENDS,
        sites=0, cache=True),
    "bamba": causal("BambaForCausalLM", _GROUPED | _MAMBA2 | {"attn_layer_indices": [1]},
                     sites=1),
    "falcon-h1": causal("FalconH1ForCausalLM", _HEADED | _MAMBA2 | {"mamba_d_ssm": 64}),
    "granite-hybrid": causal("GraniteMoeHybridForCausalLM", _GROUPED | _MAMBA2 | _EXPERTS | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}, sites=1),
    "nemotron-h": causal("NemotronHForCausalLM", _HEADED | {
        "num_hidden_layers": 4, "layer_types": ["mamba", "attention", "mlp", "moe"],
        "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
        "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "n_group": 1,
        "topk_group": 1}, blocks=(4,), sites=1),
    "jamba": Family("JambaForCausalLM", "JambaConfig", _GROUPED | _EXPERTS | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
        sites=1),
    "minimax": Family("MiniMaxForCausalLM", "MiniMaxConfig", _HEADED | _EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"]}, sites=1),
    "kimi-linear": causal("KimiLinearForCausalLM", _DEEPSEEK | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 4,
        "linear_head_dim": 8, "num_experts": 4, "num_experts_per_token": 2, "head_dim": 4},
        sites=1),
    "lfm2": causal("Lfm2ForCausalLM", _GROUPED | {"layer_types": ["conv", "full_attention"]},
                    sites=1),
    "qwen3-next": causal("Qwen3NextForCausalLM", _LINEAR | _EXPERTS | {
        "shared_expert_intermediate_size": 32}, sites=1),
    "qwen3.5": Family("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _LINEAR, sites=1, cache=True),
    "rwkv": Family("RwkvForCausalLM", "RwkvConfig", {
        "num_hidden_layers": LAYERS, "hidden_size": 32, "attention_hidden_size": 32,
        "vocab_size": 97, "context_length": 64} | _ENDS, blocks=(2 * LAYERS,), sites=0),
}  # fmt: skip

ENCODERS: Mapping[str, Family] = {
    "bert": _encoder("Bert"),
    "bert-classifier": Family("BertForSequenceClassification", "BertConfig", _TEXT),
    "roberta": _encoder("Roberta"),
    "xlm-roberta": _encoder("XLMRoberta"),
    "electra": _encoder("Electra", _TEXT | {"embedding_size": 16}),
    "mpnet": _encoder("MPNet"),
    "distilbert": _encoder("DistilBert", {
        "n_layers": LAYERS, "dim": 32, "n_heads": 4, "hidden_dim": 64, "vocab_size": 97,
        "max_position_embeddings": 64}),
    "modernbert": _encoder("ModernBert", _TEXT | {"local_attention": 4}),
    "deberta": _encoder("Deberta", _TEXT | {
        "relative_attention": True, "pos_att_type": "c2p|p2c", "type_vocab_size": 0}),
    "deberta-v2": _encoder("DebertaV2", _TEXT | {
        "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 8,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "type_vocab_size": 0}),
    "albert": _encoder("Albert", _TEXT | {"embedding_size": 16}),
    "convbert": _encoder("ConvBert", _TEXT | {"embedding_size": 32, "head_ratio": 2}),
    "mobilebert": _encoder("MobileBert", _TEXT | {
        "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "squeezebert": _encoder("SqueezeBert", _TEXT | {
        "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1,
        "post_attention_groups": 1, "intermediate_groups": 1, "output_groups": 1}),
    "roformer": _encoder("RoFormer", _TEXT | {"embedding_size": 32}),
    "esm": _encoder("Esm", _TEXT | {"mask_token_id": 3, "position_embedding_type": "rotary"}),
    "fnet": _encoder("FNet", _TEXT, sites=0),
    "layoutlm": _encoder("LayoutLM", _TEXT | {"max_2d_position_embeddings": 64}),
    "t5-encoder": Family("T5EncoderModel", "T5Config", _T5),
    "clip-text": Family("CLIPTextModelWithProjection", "CLIPTextConfig",
                        _TEXT | {"projection_dim": 24}),
}  # fmt: skip

PAIRS: Mapping[str, Family] = {
    "t5": _pair("T5ForConditionalGeneration", "T5Config", _T5),
    "mt5": _pair("MT5ForConditionalGeneration", "MT5Config",
                  _T5 | {"feed_forward_proj": "gated-gelu"}),
    "bart": _pair("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": _pair("MBartForConditionalGeneration", "MBartConfig", _BART),
    "marian": _pair("MarianMTModel", "MarianConfig", _MARIAN),
    "pegasus": _pair("PegasusForConditionalGeneration", "PegasusConfig", _BART),
    "m2m-100": _pair("M2M100ForConditionalGeneration", "M2M100Config", _BART),
    "blenderbot": _pair("BlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
    "whisper": _pair("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "speech-to-text": _pair("Speech2TextForConditionalGeneration", "Speech2TextConfig",
                             _WHISPER | {"input_feat_per_channel": 8, "conv_channels": 16}),
}  # fmt: skip

VISION: Mapping[str, Family] = {
    "vit": Family("ViTForImageClassification", "ViTConfig", _VISION),
    "deit": _encoder("DeiT", _VISION),
    "dinov2": _encoder("Dinov2", _VISION | {"mlp_ratio": 2}),
    "beit": _encoder("Beit", _VISION),
    "dpt": Family("DPTForDepthEstimation", "DPTConfig", _VISION | {
        "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
        "reassemble_factors": [4, 2, 1, 0.5], "is_hybrid": False},
        blocks=(4,)),
    "yolos": Family("YolosForObjectDetection", "YolosConfig", _VISION | {
        "image_size": [16, 16], "num_detection_tokens": 4}),
    "clip": Family("CLIPModel", "CLIPConfig", _CLIP, blocks=_BOTH),
    "clip-vision": Family("CLIPVisionModelWithProjection", "CLIPVisionConfig",
                          _VISION | {"projection_dim": 24}),
    "siglip": Family("SiglipModel", "SiglipConfig", {
        "text_config": _TEXT | {"projection_size": 32}, "vision_config": _VISION}, blocks=_BOTH,
        sites=2 * LAYERS + 1),
    "swin": _encoder("Swin", {
        "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
        "window_size": 4}, blocks=_BOTH),
    "segformer": Family("SegformerForImageClassification", "SegformerConfig", {
        "num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4],
        "mlp_ratios": [2, 2], "image_size": 32}, blocks=_BOTH),
    "resnet": Family("ResNetForImageClassification", "ResNetConfig",
                     _STAGES | {"layer_type": "basic"}, blocks=_BOTH, sites=0),
    "convnext": Family("ConvNextForImageClassification", "ConvNextConfig",
                       _STAGES, blocks=_BOTH, sites=0),
    "mobilenet-v2": Family("MobileNetV2ForImageClassification", "MobileNetV2Config",
                           {"image_size": 32, "depth_multiplier": 0.25},
                           blocks=(1, 2, 3, 2, 2), sites=0),
    "detr": Family("DetrForObjectDetection", "DetrConfig", _DETECTION,
                   blocks=_BOTH, sites=3 * LAYERS),
    "table-transformer": Family("TableTransformerForObjectDetection", "TableTransformerConfig",
                                _DETECTION, blocks=_BOTH, sites=3 * LAYERS),
}  # fmt: skip

SPEECH: Mapping[str, Family] = {
    "wav2vec2": Family("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH),
    "hubert": Family("HubertForCTC", "HubertConfig", _SPEECH),
    "wavlm": Family("WavLMModel", "WavLMConfig", _SPEECH | {
        "num_buckets": 8, "max_bucket_distance": 16}),
    "ast": Family("ASTForAudioClassification", "ASTConfig", _BODY | {
        "intermediate_size": 64, "patch_size": 4, "frequency_stride": 4, "time_stride": 4,
        "max_length": 16, "num_mel_bins": 8}),
    "data2vec-audio": Family("Data2VecAudioModel", "Data2VecAudioConfig", _SPEECH | {
        "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}),
}  # fmt: skip

IMAGES_AND_TEXT: Mapping[str, Family] = {
    "llava": Family("LlavaForConditionalGeneration", "LlavaConfig", {
        "vision_config": _CLIP_VISION | {"num_hidden_layers": 3}, "text_config": _LLAMA,
        "image_token_id": 96, "image_seq_length": 16}, blocks=_BOTH, cache=True),
    "llava-next": Family("LlavaNextForConditionalGeneration", "LlavaNextConfig", {
        "vision_config": _CLIP_VISION | {"num_hidden_layers": 3},
        "text_config": _LLAMA | {"max_position_embeddings": 256},
        "image_token_id": 96, "image_seq_length": 16,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}, blocks=_BOTH, cache=True),
    "llava-onevision": Family("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", {
        "vision_config": _SIGLIP | {"vision_use_head": False},
        "text_config": _QWEN | {"max_position_embeddings": 256}, "image_token_id": 96,
        "video_token_id": 95,
        "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]], "vision_feature_layer": -1},
        blocks=_BOTH, cache=True),
    "qwen2-vl": Family("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {
        "text_config": _GROUPED | _TURNED, "vision_config": _QWEN_VISION | {
            "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "image_size": [16, 24]},
        **_QWEN_WORDS}, blocks=_BOTH, cache=True),
    "qwen2.5-vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {
        "text_config": _GROUPED | _TURNED, "vision_config": _QWEN_VISION | {
            "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1], "image_size": [16, 24]},
        **_QWEN_WORDS}, blocks=_BOTH, cache=True),
    "qwen3-vl": Family("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {
        "text_config": _HEADED | _TURNED, "vision_config": _QWEN3_VISION, **_QWEN_WORDS},
        blocks=_BOTH, cache=True),
    "qwen3-vl-moe": Family("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig", {
        "text_config": _HEADED | _TURNED | _EXPERTS, "vision_config": _QWEN3_VISION,
        **_QWEN_WORDS}, blocks=_BOTH, cache=True),
    "glm-4.1v": Family("Glm4vForConditionalGeneration", "Glm4vConfig", {
        "text_config": _GROUPED | _TURNED, "vision_config": _QWEN_VISION | {
            "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "image_size": 16},
        **dict(zip(("image_token_id", "video_token_id", "image_start_token_id",
                    "image_end_token_id", "video_start_token_id", "video_end_token_id"),
                   range(96, 90, -1), strict=True))}, blocks=_BOTH, cache=True),
    "paligemma": Family("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", {
        "vision_config": _SIGLIP | {"projection_dim": 32, "vision_use_head": False},
        "text_config": _HEADED | {"model_type": "gemma"}, "image_token_id": 96,
        "projection_dim": 32}, blocks=_BOTH, cache=True),
    "smolvlm": Family("SmolVLMForConditionalGeneration", "SmolVLMConfig", {
        "vision_config": _VISION | {"model_type": "smolvlm_vision"}, "text_config": _LLAMA,
        "image_token_id": 96, "scale_factor": 2}, blocks=_BOTH, cache=True),
    "idefics3": Family("Idefics3ForConditionalGeneration", "Idefics3Config", {
        "vision_config": _VISION, "text_config": _LLAMA, "image_token_id": 96, "scale_factor": 2},
        blocks=_BOTH, cache=True),
    "blip-2": Family("Blip2ForConditionalGeneration", "Blip2Config", {
        "vision_config": _VISION, "text_config": _OPT | {"model_type": "opt"},
        "qformer_config": _TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 2},
        "num_query_tokens": 4, "image_token_index": 96}, blocks=(LAYERS, LAYERS, LAYERS),
        sites=3 * LAYERS + 1, cache=True),
}  # fmt: skip



def _denoiser(model: str, sizes: Mapping[str, Any], **facts: Any) -> Family:
    """A model of diffusers, which takes its sizes itself."""
    return Family(model, "", sizes, library="diffusers", **facts)


_STEPS = {
    "sample_size": 8, "norm_num_groups": 8, "block_out_channels": [16, 32], "layers_per_block": 1,
}  # fmt: skip
_UNET = _STEPS | {
    "cross_attention_dim": 24, "attention_head_dim": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
_JOINT = {"num_attention_heads": 4, "attention_head_dim": 8, "joint_attention_dim": 24,
          "pooled_projection_dim": 16}  # fmt: skip
DIFFUSION: Mapping[str, Family] = {
    "unet": _denoiser("UNet2DConditionModel", _UNET, blocks=(), sites=8),
    "unet-xl": _denoiser("UNet2DConditionModel", _UNET | {
        "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40},
        blocks=(), sites=8),
    "dit": _denoiser("DiTTransformer2DModel", {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": LAYERS,
        "sample_size": 8, "norm_num_groups": 8, "num_embeds_ada_norm": 10, "out_channels": 8}),
    "sd3": _denoiser("SD3Transformer2DModel", _JOINT | {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": LAYERS,
        "caption_projection_dim": 32, "pos_embed_max_size": 8},
        blocks=(), sites=LAYERS),
    "flux": _denoiser("FluxTransformer2DModel", _JOINT | {
        "in_channels": 16, "num_layers": 1, "num_single_layers": LAYERS, "guidance_embeds": True,
        "axes_dims_rope": [2, 2, 4]}, sites=1 + LAYERS),
    "autoencoder": _denoiser("AutoencoderKL", _STEPS | {
        "sample_size": 16, "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2}, blocks=(), sites=2),
}  # fmt: skip

FAMILIES: Mapping[str, Family] = {
    **DECODERS, **ENCODERS, **PAIRS, **VISION, **SPEECH, **IMAGES_AND_TEXT, **DIFFUSION,
    **MORE_VISION, **MORE_IMAGES_AND_TEXT, **SEEING, **MORE_DECODERS, **MORE_ENCODERS,
    **MORE_PAIRS, **MORE_SPEECH,
}
