"""A tiny, randomly initialised model of every causal language model type that transformers knows.

    build("mixtral")            # float32, eval mode, in well under a second, without network
    names(); kind("mixtral"); refusal("bert")

The sizes come from one table of field names; `_CHANGES` holds what a type needs beside it, `_VARIANTS` rows that set
an option of a type. Weights are large on purpose: at the usual 0.02 a model of two layers all but ignores its context,
and a wrong mask, position or adapter changes nothing that can be measured.
"""

import contextlib
import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY, LAYERS, WINDOW = 320, 2, 6

_SMALL: Mapping[str, Any] = {
    # widths
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size", "lru_width"), 32
    ),
    **dict.fromkeys(("dim_model_base", "attention_hidden_size", "input_embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("output_embedding_size", "pronunciation_embed_dim", "shape_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("dff", "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 24),
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "kv_channels", "swa_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    "query_pre_attn_scalar": 8,
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    # vocabulary and positions
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("context_length", "max_source_positions", "model_max_length"), 256),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    # reach of attention: shorter than the rows it is tried on, so that it acts
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("attention_chunk_size", "local_attention"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 4),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    # state spaces
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    "mamba_d_ssm": 64,
    "n_groups": 1,
    # indexers and hyper-connections
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    **dict.fromkeys(("index_topk",), 6),
    **dict.fromkeys(("hc_mult", "hc_count"), 2),
    "hc_lowrank": 8,
}

_ALTERNATE = ["sliding_attention", "full_attention"]
_SHARED = ["mamba", "mamba", "hybrid", "mamba", "hybrid"]  # the hybrid layers share one attention block
_DECODER = {"is_decoder": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {  # of the layers with a window, which dots3 describes apart
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

# what a type needs beside the table above
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), _DECODER),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"), _DECODER),
    **dict.fromkeys(("roformer", "xlm-roberta", "xlm-roberta-xl"), _DECODER),
    **{key: {"logit_scale": 1.0} for key in ("cohere", "cohere2", "cohere2_moe")},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False, "local_attention_window_len": WINDOW, "encoder_hash_byte_group_vocab": 64},
    **{key: {"hidden_size_global": 32, "num_key_value_heads": 4} for key in ("blt_local_encoder", "blt_local_decoder")},
    **{key: {"num_key_value_heads": 4} for key in ("blt_global_transformer", "blt_patcher")},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE | {"mrope_section": [2, 1, 1]}),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    **{key: {f"swa_{name}": size for name, size in _LATENT.items()} for key in ("dots3_note_text",)},
    "dots3_note": {
        "vision_config": {"hidden_size": 32, "num_attention_heads": 4, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _ALTERNATE * 2,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 64,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"num_experts": None, "hidden_size_per_layer_input": 8, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "got_ocr2_vision": {"output_channels": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "flint": {"mlp_only_layers": [0]},
    "laguna": {"layer_types": _ALTERNATE, "num_attention_heads_per_layer": [4, 8]},
    "mellum": {"layer_types": _ALTERNATE},
    "moshi": {"ffn_dim": 96},
    "lfm2": {"block_multiple_of": 16, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _DECODER | {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "mode": "train"},
    "xmod": _DECODER | {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "layer_types": ["hybrid", "hybrid_sliding"]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "youtu": {"pad_token_id": None},  # its loader zeroes the row of the padding token
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": _SHARED,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {"num_hidden_layers": 5, "layers_block_type": _SHARED, "num_key_value_heads": 4},
}

_WINDOWS = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}

# rows beside the types: name -> type, what its config says instead
_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "falcon (new decoder architecture)": ("falcon", {"new_decoder_architecture": True}),
    "falcon (a key for each head)": ("falcon", {"multi_query": False, "num_kv_heads": 4}),
    "falcon (alibi, sequential)": ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "mpt (no alibi)": ("mpt", {"attn_config": {"alibi": False}}),
    "gpt2 (reordered attention)": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode (a key for each head)": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox (sequential)": ("gpt_neox", {"use_parallel_residual": False}),
    "opt (projections, norm after)": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama (biases)": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama (dynamic rope)": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama (yarn)": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "phi3 (longrope)": (
        "phi3",
        {"rope_parameters": _LONG | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 16},
    ),
    "mistral (no window)": ("mistral", {"sliding_window": None}),
    "qwen2 (windows above layer 1)": ("qwen2", _WINDOWS),
    "qwen3 (windows above layer 1)": ("qwen3", _WINDOWS),
    "starcoder2 (no window)": ("starcoder2", {"sliding_window": None}),
    "mllama (cross-attention)": (
        "mllama",
        {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1], "layer_types": None}},
    ),
    "stablelm (parallel)": ("stablelm", {"use_parallel_residual": True}),
    "stablelm (query and key norms)": ("stablelm", {"qk_layernorm": True}),
    "phi (query and key norms)": ("phi", {"qk_layernorm": True}),
    "cohere (query and key norms)": ("cohere", {"use_qk_norm": True, "logit_scale": 4.0}),
    "olmo (clipped)": ("olmo", {"clip_qkv": 2.0}),
    "doge (experts)": ("doge", {"is_moe": True, "num_experts": 16}),
    "deepseek_v2 (whole queries)": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek_v3 (grouped routing)": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    "qwen3_moe (dense first)": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "gemma4_text (experts)": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "hrm_text (no prefix)": ("hrm_text", {"prefix_lm": False}),
    "zamba2 (two blocks, adapters)": (
        "zamba2",
        {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True, "adapter_rank": 8},
    ),
    "bert (encoder)": ("bert", {"is_decoder": False}),
    "roberta (encoder)": ("roberta", {"is_decoder": False}),
    "gemma3 (bidirectional)": ("gemma3", {"text_config": {"use_bidirectional_attention": True}}),
    "gemma3_text (bidirectional)": ("gemma3_text", {"use_bidirectional_attention": True}),
    "xlm (masked)": ("xlm", {"causal": False}),
    "xlnet (bidirectional)": ("xlnet", {"attn_type": "bi"}),
}

_ENCODERS = {of for of, changes in _CHANGES.items() if "is_decoder" in changes and of != "reformer"} | {"xlm", "xlnet"}
_HALVES = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "trocr", "whisper"),
)
_PARALLEL_MIXERS = ("falcon_h1", "inkling_text", "inkling2_text")  # attention and another mixer in one layer

_SEES_AHEAD = "its tokens see the ones after them"
_DRAFTS = "it drafts for another model, whose keys, values and hidden states it reads"
_TIMM = "its vision tower is one of timm's, another package; its language model is gemma3n_text"
_AUDIO = "it predicts several codebooks of audio at once, and no text"
_REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("cpmant", "doge (experts)"), _SEES_AHEAD),
    **{name: _SEES_AHEAD for name in _VARIANTS if name.endswith(("(encoder)", "(bidirectional)", "(masked)"))},
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    "gemma3n": _TIMM,
    **dict.fromkeys(("musicgen", "musicgen_melody"), _AUDIO),
}

# rows that need larger weights than the others for their context to show
_GAIN: Mapping[str, float] = {
    **dict.fromkeys(("apertus", "bart", "bert", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot-small"), 1.5),
    **dict.fromkeys(("bloom", "codegen", "ctrl", "data2vec-text", "electra", "ernie", "falcon", "fuyu", "gemma"), 1.5),
    **dict.fromkeys(("gpt_neox", "gptj", "hrm_text", "hy_v3", "jetmoe", "mbart", "megatron-bert", "mvp"), 1.5),
    **dict.fromkeys(("nanochat", "openai-gpt", "pegasus", "phi", "plbart", "rembert", "roberta"), 1.5),
    **dict.fromkeys(("roberta-prelayernorm", "roformer", "trocr", "xglm", "xlm-roberta-xl", "xlnet"), 1.5),
    **dict.fromkeys(("falcon (new decoder architecture)", "falcon (a key for each head)"), 1.5),
    **dict.fromkeys(("falcon (alibi, sequential)", "opt (projections, norm after)", "hrm_text (no prefix)"), 1.5),
    **dict.fromkeys(("bert (encoder)", "roberta (encoder)", "xlnet (bidirectional)", "cohere"), 1.5),
    **dict.fromkeys(("falcon (alibi)", "minicpm3", "phi (query and key norms)", "roc_bert"), 2.0),
    **dict.fromkeys(("cpmant", "marian", "zaya"), 2.5),
}


# matrices whose beginning means something: rates at which a state decays
_KEPT = ("A_log", "time_decay", "time_first", "recurrent_param")


def names() -> list[str]:
    """Every type of transformers' table of causal language models, then the variants, as `type (option)`."""
    return [*types(), *(name for name, (of, _) in _VARIANTS.items() if of in types())]


@functools.cache
def types() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def kind(name: str) -> str:
    """What is special about a row, in a few words: `moe, sliding`, `state space`; `dense` where nothing is."""
    of = _VARIANTS.get(name, (name, {}))[0]
    if of in _HALVES:
        return "decoder half of an encoder-decoder"
    if of in _ENCODERS:
        return "encoder" if refusal(name) else "encoder made a decoder"
    if refusal(name):
        return "no language model" if refusal(name) != _SEES_AHEAD else "bidirectional"
    whole = config(name)
    text = whole.get_text_config()
    fields = vars(text)
    layers = set(fields.get("layer_types") or getattr(text, "layers_block_type", None) or ())
    mixers = {layer for layer in layers if not _attends(layer)}
    experts = any(isinstance(v, int) and v > 1 for k, v in fields.items() if re.search("experts$", k))
    found = {
        "vision-language": hasattr(whole, "vision_config") or of == "mllama",
        "state space": of in ("mamba", "mamba2", "falcon_mamba"),
        "recurrent": of in ("rwkv", "xlstm"),
        "hybrid": bool(mixers) or of in _PARALLEL_MIXERS,
        "latent attention": "kv_lora_rank" in fields,
        "moe": (experts and of != "doge") or bool(fields.get("is_moe")) or of == "dbrx",
        "sliding": any("sliding" in layer for layer in layers) or _slides(text) or of in ("gpt_neo", "reformer"),
        "compressed": any("compressed" in layer for layer in layers),
        "chunked": "chunked_attention" in layers,
        "alibi": of == "bloom" or bool(fields.get("alibi")) or (of == "mpt" and text.attn_config.alibi),
        "dynamic mask": of == "doge",
    }
    return ", ".join(label for label, holds in found.items() if holds) or "dense"


def refusal(name: str) -> str | None:
    """Why the row is no decoder-only language model of text; None where it is one."""
    return _REFUSED.get(name)


def config(name: str) -> "PretrainedConfig":
    """The tiny config of a row."""
    from transformers import CONFIG_MAPPING

    of, changes = _VARIANTS.get(name, (name, {}))
    with _quiet():
        return CONFIG_MAPPING[of](**_merged(_fields(CONFIG_MAPPING[of], of), changes))


def build(
    name: str, *, seed: int = 0, std: float = 0.2, prepare: Callable[[Any], Any] = lambda config: config
) -> "PreTrainedModel":
    """The tiny model of a row: float32, eval mode, weights that show a fault. `prepare` may change its config."""
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(prepare(config(name)), dtype=torch.float32)
        _initialise(model, std * _GAIN.get(name, 1.0))
    return model.eval()


def outline(name: str) -> "PreTrainedModel":
    """The model of a row without weights, for what can be told from its modules."""
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name))


def _fields(config_class: Any, of: str) -> dict[str, Any]:
    """What to call the class of a config with, so that it describes a tiny model with each kind of layer."""
    default = config_class()
    known = {field.name for field in dataclasses.fields(config_class)}
    found = {name: value for name, value in _SMALL.items() if name in known and _replaceable(vars(default).get(name))}
    if "kv_lora_rank" in known:
        found["num_key_value_heads"] = found["num_attention_heads"]  # multi-head latent attention has no groups
    found |= _layers(default, known)
    for name, value in vars(default).items():
        if hasattr(value, "model_type") and name in known:
            found[name] = _fields(type(value), value.model_type) | {"model_type": value.model_type}
    return _merged(found, _CHANGES.get(of, {}))


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with changes, those inside a nested config as well."""
    nested = {
        name: _merged(fields[name], value)
        for name, value in changes.items()
        if name.endswith("_config") and isinstance(fields.get(name), dict)
    }
    return {**fields, **changes, **nested}


def _attends(layer: str) -> bool:
    return ("attention" in layer and "linear" not in layer) or layer in ("mlp", "moe", "attention")


def _slides(text: "PretrainedConfig") -> bool:
    window = getattr(text, "sliding_window", None)
    return bool(window) and getattr(text, "use_sliding_window", True) and not getattr(text, "layer_types", None)


def _replaceable(value: Any) -> bool:
    return value is None or (isinstance(value, int | list | str) and not isinstance(value, bool))


def _layers(default: Any, known: set[str]) -> dict[str, Any]:
    """The first layers of the default config that show each of its kinds: sliding and full, dense and sparse."""
    count = getattr(default, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, list) and len(value) == count and name in known and value != list(range(count))
    }
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    chosen = sorted({rows.index(row) for row in rows})
    chosen = chosen if len(chosen) >= LAYERS else list(range(LAYERS))
    return {name: [value[i] for i in chosen] for name, value in lists.items()} | {"num_hidden_layers": len(chosen)}


def _initialise(model: "torch.nn.Module", std: float) -> None:
    """Matrices anew, normal with `std`; vectors and what steers a recurrence keep their beginning, with noise."""
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # sinusoidal positions, which saving leaves out
        noise = torch.randn(parameter.shape)
        vector = parameter.numel() == parameter.shape[-1] if parameter.ndim else True
        with torch.no_grad():
            parameter.copy_(parameter + noise * std / 2 if vector or name.endswith(_KEPT) else noise * std)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about tiny configs (token ids beyond a vocabulary, missing kernels)."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
