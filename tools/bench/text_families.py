"""Small models of more families that write, read or hear.

As those of ``family_models``: random weights, two layers a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family_table import LAYERS, Family, causal

_BODY = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _BODY | _ENDS | {"vocab_size": 97, "max_position_embeddings": 64, "intermediate_size": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_HEADED = _GROUPED | {"head_dim": 8}
_BY_TURNS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_ROUTED = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
           "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1, "n_shared_experts": 1, "num_shared_experts": 1,
           "num_dense_layers": 1, "shared_expert_intermediate_size": 32}  # fmt: skip
_LATENT = _TEXT | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
_INDEXED = _LATENT | _ROUTED | {"index_n_heads": 8, "index_head_dim": 8, "index_topk": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
           "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
           "linear_conv_kernel_dim": 4}  # fmt: skip
_GPT = {"n_layer": LAYERS, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 64} | _ENDS
_T5 = {"num_layers": LAYERS, "num_decoder_layers": LAYERS, "d_model": 32, "num_heads": 4, "d_kv": 8,
       "d_ff": 64, "vocab_size": 97, "decoder_start_token_id": 0, "pad_token_id": 0,
       "eos_token_id": 1}  # fmt: skip
_BART = {
    "encoder_layers": LAYERS, "decoder_layers": LAYERS, "d_model": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 97,
    "max_position_embeddings": 64, "decoder_start_token_id": 2,
} | _ENDS  # fmt: skip
_SPEECH: dict[str, Any] = _BODY | _ENDS | {
    "intermediate_size": 64, "vocab_size": 32, "conv_dim": (16, 16), "conv_kernel": (10, 3),
    "conv_stride": (5, 2), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 4, "codevector_dim": 8,
    "mask_time_prob": 0.0,
}  # fmt: skip
_PARAKEET = _BODY | {"intermediate_size": 64, "num_mel_bins": 16, "subsampling_conv_channels": 8,
                     "max_position_embeddings": 64}  # fmt: skip
_SPECTRAL = _BODY | _ENDS | {"intermediate_size": 64, "vocab_size": 32, "mask_time_prob": 0.0,
                             "feature_projection_input_dim": 16}  # fmt: skip
_SPEECHT5 = {name: size for name, size in _SPEECH.items() if name not in _BODY} | _BART | {
    "hidden_size": 32, "max_speech_positions": 64, "max_text_positions": 64,
    "encoder_max_relative_position": 8,
}  # fmt: skip
_SEAMLESS = _BART | {
    "hidden_size": 32, "t2u_vocab_size": 20, "speech_encoder_layers": LAYERS,
    "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 64,
    "feature_projection_input_dim": 16, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "max_source_positions": 64, "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
}  # fmt: skip
_CLAP = {"window_size": 4, "num_mel_bins": 8, "spec_size": 32, "patch_size": 4,
         "patch_stride": [4, 4], "hidden_size": 32, "depths": [2, 2], "num_attention_heads": [2, 4],
         "patch_embeds_hidden_size": 16, "num_hidden_layers": 2, "projection_dim": 24}  # fmt: skip
_SERIES = {"num_input_channels": 3, "context_length": 32, "patch_length": 8,
           "prediction_length": 8}  # fmt: skip
_BOTH = (LAYERS, LAYERS)


def _masked(name: str, sizes: Mapping[str, Any] = _TEXT, **facts: Any) -> Family:
    return Family(f"{name}ForMaskedLM", f"{name}Config", sizes, **facts)


def _pair(name: str, sizes: Mapping[str, Any], of: str = "ConditionalGeneration",
          **facts: Any) -> Family:  # fmt: skip
    """An encoder and a decoder, which looks at itself and at the encoder."""
    told: dict[str, Any] = {"blocks": _BOTH, "sites": 3 * LAYERS, "cache": True, **facts}
    return Family(f"{name}For{of}", f"{name}Config", sizes, **told)


def _heard(name: str, sizes: Mapping[str, Any] = _SPEECH, **facts: Any) -> Family:
    return Family(f"{name}ForCTC", f"{name}Config", sizes, **facts)


MORE_DECODERS: Mapping[str, Family] = {
    "arcee": causal("ArceeForCausalLM", _HEADED),
    "glm": causal("GlmForCausalLM", _HEADED),
    "helium": causal("HeliumForCausalLM", _HEADED),
    "ministral": causal("MinistralForCausalLM", _HEADED | _BY_TURNS),
    "ministral3": causal("Ministral3ForCausalLM", _HEADED),
    "cwm": causal("CwmForCausalLM", _HEADED | {"sliding_window": 4}),
    "nanochat": causal("NanoChatForCausalLM", _GROUPED),
    "vaultgemma": causal("VaultGemmaForCausalLM", _HEADED | {"sliding_window": 4}),
    "jais2": causal("Jais2ForCausalLM", _HEADED),
    "hyperclovax": causal("HyperCLOVAXForCausalLM", _HEADED),
    "diffllama": causal("DiffLlamaForCausalLM", _GROUPED, sites=2 * LAYERS),
    "doge": causal("DogeForCausalLM", _GROUPED),
    "minicpm3": causal("MiniCPM3ForCausalLM", _LATENT),
    "modernbert-decoder": causal("ModernBertDecoderForCausalLM", _TEXT),
    "ctrl": causal("CTRLLMHeadModel", _GPT | {"dff": 64}),
    "openai-gpt": Family("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT),
    "minimax-m2": causal("MiniMaxM2ForCausalLM", _HEADED | _ROUTED),
    "dots1": causal("Dots1ForCausalLM", _GROUPED | _ROUTED),
    "hunyuan-moe": causal("HunYuanMoEV1ForCausalLM", _HEADED | _ROUTED | {"moe_topk": 2}),
    "glm4-moe-lite": causal("Glm4MoeLiteForCausalLM", _LATENT | _ROUTED),
    "glm-moe-dsa": Family("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", _INDEXED),
    "deepseek-v3.2": Family("DeepseekV32ForCausalLM", "DeepseekV32Config", _INDEXED),
    "granite-moe-shared": causal("GraniteMoeSharedForCausalLM", _GROUPED | _ROUTED | {
        "shared_intermediate_size": 32}),
    "jetmoe": causal("JetMoeForCausalLM", _GROUPED | _ROUTED | {"kv_channels": 8}),
    "afmoe": causal("AfmoeForCausalLM", _HEADED | _ROUTED | _BY_TURNS),
    "flex-olmo": causal("FlexOlmoForCausalLM", _GROUPED | _ROUTED),
    "exaone-moe": causal("ExaoneMoeForCausalLM", _GROUPED | _ROUTED | _BY_TURNS),
    "cohere2-moe": causal("Cohere2MoeForCausalLM", _HEADED | _ROUTED | _BY_TURNS),
    "mimo-v2-flash": causal("MiMoV2FlashForCausalLM", _HEADED | _ROUTED | {
        "v_head_dim": 8, "sliding_window": 4}),
    "solar-open": causal("SolarOpenForCausalLM", _HEADED | _ROUTED),
    "laguna": causal("LagunaForCausalLM", _HEADED | _ROUTED | _BY_TURNS),
    "hunyuan-v3": causal("HYV3ForCausalLM", _HEADED | _ROUTED),
    "lfm2-moe": causal("Lfm2MoeForCausalLM", _GROUPED | _ROUTED | {
        "layer_types": ["conv", "full_attention"]}, sites=1),
    "qwen3.5-moe": Family("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
                          _HEADED | _ROUTED | _LINEAR, sites=1, cache=True),
    "olmo-hybrid": causal("OlmoHybridForCausalLM", _GROUPED | _LINEAR, sites=1),
    "falcon-mamba": Family("FalconMambaForCausalLM", "FalconMambaConfig", {
        "num_hidden_layers": LAYERS, "hidden_size": 32, "state_size": 4, "vocab_size": 97} | _ENDS,
        sites=0),
}  # fmt: skip

MORE_ENCODERS: Mapping[str, Family] = {
    "camembert": _masked("Camembert"),
    "xlm-roberta-xl": _masked("XLMRobertaXL"),
    "megatron-bert": _masked("MegatronBert"),
    "rembert": _masked("RemBert", _TEXT | {"input_embedding_size": 16,
                                           "output_embedding_size": 24}),
    "ernie": _masked("Ernie"),
    "data2vec-text": _masked("Data2VecText"),
    "eurobert": _masked("EuroBert", _GROUPED),
    "nomic-bert": _masked("NomicBert"),
    "gte": _masked("Gte"),
    "jina-v3": _masked("JinaEmbeddingsV3"),
    "nystromformer": _masked("Nystromformer"),
    "ibert": _masked("IBert", _TEXT | {"quant_mode": False}),
    "esmc": _masked("Esmc", _TEXT | {"num_key_value_heads": 4}),
    "longformer": _masked("Longformer", _TEXT | {"attention_window": 4}, sites=2 * LAYERS),
    "bigbird": _masked("BigBird", _TEXT | {
        "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
    "xlnet": Family("XLNetLMHeadModel", "XLNetConfig", {
        "n_layer": LAYERS, "d_model": 32, "n_head": 4, "d_inner": 64, "vocab_size": 97} | _ENDS,
        sites=0),
    "dpr": Family("DPRQuestionEncoder", "DPRConfig", _TEXT),
    "splinter": Family("SplinterForQuestionAnswering", "SplinterConfig", _TEXT),
    "privacy-filter": Family("OpenAIPrivacyFilterForTokenClassification",
                             "OpenAIPrivacyFilterConfig", _HEADED | _ROUTED | {
                                 "sliding_window": 4}),
    "layoutlmv3": Family("LayoutLMv3ForTokenClassification", "LayoutLMv3Config", _TEXT | {
        "max_2d_position_embeddings": 64, "coordinate_size": 6, "shape_size": 4, "input_size": 16,
        "patch_size": 4}),
    "lilt": Family("LiltForTokenClassification", "LiltConfig", _TEXT | {
        "hidden_size": 48, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64},
        blocks=(), sites=0),
    "bros": Family("BrosForTokenClassification", "BrosConfig", _TEXT | {"hidden_size": 64}),
    "markuplm": Family("MarkupLMForTokenClassification", "MarkupLMConfig", _TEXT | {
        "max_depth": 6, "xpath_unit_hidden_size": 8}),
    "tapas": Family("TapasForQuestionAnswering", "TapasConfig", _TEXT | {
        "type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4], "max_num_rows": 8, "max_num_columns": 8}),
}  # fmt: skip

MORE_PAIRS: Mapping[str, Family] = {
    "umt5": _pair("UMT5", _T5),
    "blenderbot-small": _pair("BlenderbotSmall", _BART),
    "mvp": _pair("Mvp", _BART),
    "led": _pair("LED", _BART | {
        "attention_window": 4, "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64}, sites=4 * LAYERS),
    "bigbird-pegasus": _pair("BigBirdPegasus", _BART | {
        "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}),
    "bert2bert": Family("EncoderDecoderModel", "EncoderDecoderConfig", {
        "encoder": _TEXT | {"model_type": "bert"}, "decoder": _TEXT | {
            "model_type": "bert", "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1, "pad_token_id": 0},
        blocks=_BOTH, sites=3 * LAYERS, cache=True),
}  # fmt: skip

MORE_SPEECH: Mapping[str, Family] = {
    "sew": _heard("SEW"),
    "unispeech": _heard("UniSpeech"),
    "unispeech-sat": _heard("UniSpeechSat"),
    "wav2vec2-conformer": _heard("Wav2Vec2Conformer"),
    "wav2vec2-bert": _heard("Wav2Vec2Bert", _SPECTRAL),
    "wav2vec2-classifier": Family("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _SPEECH),
    "parakeet": Family("ParakeetForCTC", "ParakeetCTCConfig", {
        "encoder_config": _PARAKEET, "vocab_size": 32, "pad_token_id": 0}),
    "moonshine": _pair("Moonshine", _ENDS | {
        "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": LAYERS,
        "decoder_num_hidden_layers": LAYERS, "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 64,
        "decoder_start_token_id": 1}),
    "speecht5": _pair("SpeechT5", _SPEECHT5, "SpeechToText"),
    "seamless": _pair("SeamlessM4T", _SEAMLESS, "SpeechToText", blocks=(2, 1, 2)),
    "clap": Family("ClapModel", "ClapConfig", {
        "text_config": _TEXT | {"projection_dim": 24}, "audio_config": _CLAP,
        "projection_dim": 24}, blocks=(LAYERS, LAYERS, LAYERS)),
    "patchtst": Family("PatchTSTForPrediction", "PatchTSTConfig", _SERIES | {
        "num_hidden_layers": LAYERS, "d_model": 32, "num_attention_heads": 4, "ffn_dim": 64,
        "patch_stride": 4}),
    "patchtsmixer": Family("PatchTSMixerForPrediction", "PatchTSMixerConfig", _SERIES | {
        "num_layers": LAYERS, "d_model": 16, "patch_stride": 8}, blocks=(2 * LAYERS,), sites=0),
    "clap-audio": Family("ClapAudioModelWithProjection", "ClapAudioConfig", _CLAP, blocks=_BOTH),
}  # fmt: skip
