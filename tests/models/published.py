"""The published JSON configurations of Momentum DeltaNet models."""

MDN_400M = {
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "conv_size": 4,
    "eos_token_id": 2,
    "expand_v": 2,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "swish",
    "hidden_ratio": 4,
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "model_type": "momentum_deltanet",
    "norm_eps": 1e-06,
    "num_heads": 6,
    "num_hidden_layers": 21,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_gate": True,
    "use_output_correction": True,
    "use_p_times_alpha": True,
    "use_short_conv": True,
    "min_log_mu": -2.0,
    "vocab_size": 50257,
}
MDN_1B = MDN_400M | {"head_dim": 256, "hidden_size": 2048, "tau_factor": 8, "min_log_mu": -1.0}
HYBRID_3_TO_1 = MDN_400M | {
    "attn": {
        "layers": [3, 7, 11, 15, 19, 23],
        "num_heads": 8,
        "qkv_bias": False,
        "rope_theta": 10000.0,
    },
    "expand_v": 1,
    "num_heads": 8,
    "num_hidden_layers": 24,
    "use_lora_gate": False,
}
HYBRID_7_TO_1 = HYBRID_3_TO_1 | {"attn": HYBRID_3_TO_1["attn"] | {"layers": [7, 15, 23]}}
PUBLISHED = {
    "400M": MDN_400M,
    "1B": MDN_1B,
    "hybrid 3:1": HYBRID_3_TO_1,
    "hybrid 7:1": HYBRID_7_TO_1,
}
