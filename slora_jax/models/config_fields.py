"""The known fields of a Hugging Face `config.json`, by their effect on the computation."""

import re
from typing import Any

# fmt: off
HARMLESS_FIELDS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_model_name_or_path", "_name_or_path", "attention_dropout", "attn_implementation", "bad_words_ids",
    "begin_suppress_tokens", "bos_token_id", "cache_implementation", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping", "embd_pdrop",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "initializer_range", "is_llama_config", "label2id", "length_penalty",
    "mask_token_id", "max_length", "max_sequence_length", "max_window_layers", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache",
})
"""Fields without effect on logits: bookkeeping, training, generation defaults, implementation choices."""
# fmt: on

INACTIVE: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values that switch a field off."""

_FACTOR_OF_ONE: tuple[Any, ...] = (None, 1)

# fmt: off
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_activation": (None, "silu"),
    "is_decoder": (None, False, True),
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": _FACTOR_OF_ONE,
    **dict.fromkeys(("norm_type", "layer_norm_type", "layernorm_type", "normalization_type"),
                    (None, "rms_norm", "rmsnorm", "RMSNorm")),
    **dict.fromkeys((
        # activation scales (Granite, MiniCPM, Falcon-H1, muP)
        "attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier",
        "lm_head_multiplier", "logit_scale", "logits_scaling", "residual_multiplier", "residual_scale", "scale_emb",
    ), _FACTOR_OF_ONE),
    **dict.fromkeys((
        # attention scale, here always head_dim**-0.5
        "attention_multiplier", "attn_scale", "dim_model_base", "query_pre_attn_scalar", "scale_depth",
    ), (None,)),
    **dict.fromkeys((
        # other kinds of models or weights
        "add_cross_attention", "auto_map", "chunk_size_feed_forward", "compression_config", "is_encoder_decoder",
        "pruned_heads", "quantization", "quantization_config", "vision_config",
        # logits and scores
        "attn_logit_softcapping", "attn_temperature_tuning", "clip_qkv", "final_logit_softcapping",
        "logits_soft_cap", "scale_attention_softmax_in_fp32", "scale_attn_by_inverse_layer_idx", "scale_embeddings",
        # positions
        "alibi", "no_rope_layer_interval", "no_rope_layers", "nope_layer_interval", "rope_interleaved",
        "rope_local_base_freq", "rotary_dim", "use_alibi", "use_mrope",
        # windows
        "attention_chunk_size", "attention_window", "attention_window_size", "interleaved_sliding_window",
        "local_attention", "sliding_window", "sliding_window_pattern", "sliding_window_size", "use_sliding_window",
        "use_bidirectional_attention", "window_size",
        # experts
        "decoder_sparse_step", "first_k_dense_replace", "mlp_only_layers", "moe_intermediate_size", "moe_layer_freq",
        "n_routed_experts", "n_shared_experts", "num_experts", "num_experts_per_tok", "num_local_experts",
        "shared_expert_intermediate_size",
        # norms
        "add_unit_offset", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_after", "norm_eps",
        "norm_epsilon", "post_norm", "qk_layernorm", "qk_norm", "sandwich_norm", "use_layer_norm", "use_post_norm",
        "use_qk_norm", "zero_centered_gamma",
        # biases
        "attention_bias", "attention_out_bias", "attention_output_bias", "attention_qkv_bias", "bias", "head_bias",
        "lm_head_bias", "mlp_bias", "o_bias", "qkv_bias", "use_bias", "use_qkv_bias",
        # layer structure
        "attn_layer_indices", "cross_attention_layers", "kv_lora_rank", "kv_shared_layers", "num_kv_shared_layers",
        "num_nextn_predict_layers", "parallel_attn", "parallel_residual", "q_lora_rank", "tie_embedding",
        "tie_embeddings", "use_parallel_residual",
    ), INACTIVE),
}
# fmt: on
"""Fields that can change the computation -> values that leave it unchanged. A family may support more."""

CHANGES_LOGITS = re.compile(
    r"(?:^|_)(?:alibi|experts?|moe|mup|multipliers?|nope|quant|rope|rotary|soft_?cap|softcapping|ssm|mamba)(?:_|$)"
)
"""Words in an unknown field's name that suggest a changed computation."""
