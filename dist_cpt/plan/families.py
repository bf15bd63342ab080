"""The table of model types: which weights a decoder layer of each has, under transformers' names.

A row of a layer is a `Part`. Its dimensions are symbols that `shapes.py` takes from config.json; `F+F` is a sum:
D model, Q query heads x head_dim, K key heads x head_dim, N head_dim, H heads, F ffn, V vocab; of a mixture E experts,
M ffn of an expert, S ffn of the shared ones; of latent attention A and C its two ranks, P rotary part of a head,
B all heads' query, U all heads' key and value without position, O all heads' value; of recurrent layers h heads,
k and v all heads' key and value, n value of a head, i inner features, g all groups' state, t taps of the convolution,
l inputs of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["linear", "experts", "router", "norm", "bias", "vector", "recurrence", "embedding", "head", "positions"]
ATTENTION_LAYERS = ("full_attention", "sliding_attention")
RECURRENT_LAYERS = ("conv", "linear_attention", "hybrid")  # `hybrid` has both


@dataclass(frozen=True)
class Part:
    """One weight of a layer, and its bias; a key in `bias` or `when` is a setting of config.json that switches it."""

    name: str
    dims: tuple[str, ...]  # as stored
    role: Role = "linear"
    bias: bool | str = False
    when: str = ""  # "!key": while the key is off
    transposed: bool = False  # stored [in, out]
    adaptable: bool = True  # False: a linear map that PEFT refuses to adapt


Parts = tuple[Part, ...]


def _linear(name: str, outputs: str, inputs: str, bias: bool | str = False, when: str = "") -> Part:
    return Part(f"{name}.weight", (outputs, inputs), bias=bias, when=when)


def _conv1d(name: str, outputs: str, inputs: str) -> Part:
    return Part(f"{name}.weight", (inputs, outputs), bias=True, transposed=True)


def _norms(*names: str, dim: str = "D", bias: bool = False, when: str = "") -> Parts:
    return tuple(Part(f"{name}.weight", (dim,), "norm", bias, when) for name in names)


def _attention(
    bias: bool | str = False,
    out_bias: bool | str | None = None,
    *,
    at: str = "self_attn",
    query: str = "Q",
    output: str = "o_proj",
) -> Parts:
    inputs = tuple(_linear(f"{at}.{x}_proj", out, "D", bias) for x, out in (("q", query), ("k", "K"), ("v", "K")))
    return (*inputs, _linear(f"{at}.{output}", "D", "Q", bias if out_bias is None else out_bias))


def _gated(ffn: str = "F", at: str = "mlp", bias: bool | str = False) -> Parts:
    inputs = tuple(_linear(f"{at}.{name}_proj", ffn, "D", bias) for name in ("gate", "up"))
    return (*inputs, _linear(f"{at}.down_proj", "D", ffn, bias))


def _plain(up: str, down: str, bias: bool | str = False, at: str = "mlp") -> Parts:
    return (_linear(f"{at}.{up}", "F", "D", bias), _linear(f"{at}.{down}", "D", "F", bias))


def _experts(ffn: str, at: str = "mlp", router: str = "gate") -> Parts:
    return (
        Part(f"{at}.{router}.weight", ("E", "D"), "router"),
        Part(f"{at}.experts.gate_up_proj", ("E", f"{ffn}+{ffn}", "D"), "experts"),
        Part(f"{at}.experts.down_proj", ("E", "D", ffn), "experts"),
    )


def _delta_net(*inputs: tuple[str, str]) -> Parts:
    """A gated delta net with these input maps and their outputs."""
    return (
        *(_linear(f"linear_attn.{name}", outputs, "D") for name, outputs in inputs),
        Part("linear_attn.conv1d.weight", ("k+k+v", "1", "t"), "recurrence"),
        Part("linear_attn.dt_bias", ("h",), "recurrence"),
        Part("linear_attn.A_log", ("h",), "recurrence"),
        *_norms("linear_attn.norm", dim="n"),
        _linear("linear_attn.out_proj", "D", "v"),
    )


def _mamba2(
    at: str = "mamba",
    bias: str = "mamba_proj_bias",
    out_bias: str = "mamba_proj_bias",
    norm: str = "",
    adaptable: bool = True,
) -> Parts:
    """`norm`: a setting without which the gated norm is absent; `adaptable`: whether PEFT adapts the last map."""
    return (
        _linear(f"{at}.in_proj", "i+i+g+g+h", "D", bias),
        Part(f"{at}.conv1d.weight", ("i+g+g", "1", "t"), "recurrence", "mamba_conv_bias"),
        *(Part(f"{at}.{name}", ("h",), "recurrence") for name in ("dt_bias", "A_log", "D")),
        *_norms(f"{at}.norm", dim="i", when=norm),
        Part(f"{at}.out_proj.weight", ("D", "i"), bias=out_bias, adaptable=adaptable),
    )


_HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", dim="N")
_WIDE_NORMS = (*_norms("self_attn.q_norm", dim="Q"), *_norms("self_attn.k_norm", dim="K"))
_PRE = _norms("input_layernorm", "post_attention_layernorm")
_POST = _norms("post_attention_layernorm", "post_feedforward_layernorm")
_AROUND = (*_PRE, *_norms("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_LATENT = (
    _linear("self_attn.q_proj", "B", "D", when="!q_lora_rank"),
    _linear("self_attn.q_a_proj", "A", "D", "attention_bias", when="q_lora_rank"),
    *_norms("self_attn.q_a_layernorm", dim="A", when="q_lora_rank"),
    _linear("self_attn.q_b_proj", "B", "A", when="q_lora_rank"),
    _linear("self_attn.kv_a_proj_with_mqa", "C+P", "D", "attention_bias"),
    *_norms("self_attn.kv_a_layernorm", dim="C"),
    _linear("self_attn.kv_b_proj", "U", "C"),
    _linear("self_attn.o_proj", "D", "O", "attention_bias"),
)
_PACKED_MLP = (_linear("mlp.gate_up_proj", "F+F", "D"), _linear("mlp.down_proj", "D", "F"))
_SHARED = _gated("S", "mlp.shared_experts")


_GATED = _gated()
_LAST = _norms("norm")


@dataclass(frozen=True)
class Family:
    """A model type: the parts of its layers, its names around them, and transformers' defaults for absent keys."""

    layer: Parts  # attention and norms
    defaults: Mapping[str, Any]
    mixers: Mapping[str, Parts] = field(default_factory=dict)  # by layer type, beside `layer`; the first is the default
    mlp: Parts = _GATED
    sparse: Parts = ()  # in place of `mlp` in the layers that are mixtures of experts
    sparse_from: Literal["all", "none without", "first_k_dense_replace", "decoder_sparse_step"] = "all"
    stem: str = "model."
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    norm: Parts = _LAST  # after the last layer
    positions: bool = False  # a learned table
    ties: bool = True  # False: `tie_word_embeddings` has no effect
    fused: bool = False  # its layers run as fused kernels on a GPU


def _sizes(*values: int | None, **more: Any) -> dict[str, Any]:
    """hidden, ffn, layers, heads, key heads, head_dim (null: hidden / heads), vocabulary."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip((*keys, "head_dim", "vocab_size"), values, strict=True)) | more


_LLAMA = (*_attention("attention_bias"), *_PRE)
_MLP_BIAS = _gated(bias="mlp_bias")
_TIED = {"tie_word_embeddings": True}
_OLMO2 = (*_attention("attention_bias"), *_WIDE_NORMS, *_POST)
_QWEN_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": ()}
_LATENT_SIZES = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
_DELTA_SIZES = {
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_DELTA_ATTENTION = (*_attention("attention_bias", query="Q+Q"), *_HEAD_NORMS)
_QWEN35_MIXERS = {
    "linear_attention": _delta_net(
        ("in_proj_qkv", "k+k+v"), ("in_proj_z", "v"), ("in_proj_b", "h"), ("in_proj_a", "h")
    ),
    "full_attention": _DELTA_ATTENTION,
}
_QWEN_EXPERTS = (
    *_experts("M"),
    *_gated("S", "mlp.shared_expert"),
    _linear("mlp.shared_expert_gate", "1", "D"),
)
_LFM2 = _norms("operator_norm", "ffn_norm")
_LFM2_MLP = (*(_linear(f"feed_forward.{x}", "F", "D") for x in ("w1", "w3")), _linear("feed_forward.w2", "D", "F"))
_LFM2_MIXERS = {
    "full_attention": (
        *_attention(output="out_proj"),
        *_norms("self_attn.q_layernorm", "self_attn.k_layernorm", dim="N"),
    ),
    "conv": (
        _linear("conv.in_proj", "D+D+D", "D", "conv_bias"),
        Part("conv.conv.weight", ("D", "1", "t"), "recurrence", "conv_bias"),
        _linear("conv.out_proj", "D", "D", "conv_bias"),
    ),
}
_MAMBA_SIZES = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
}
_BEFORE_FFN = _norms("input_layernorm", "pre_ff_layernorm")
_FEED_FORWARD = _gated(at="feed_forward", bias="mlp_bias")
_FINAL = _norms("final_layernorm")
_GLM = (*_attention("attention_bias", False), *_PRE)
_GLM_SIZES = _sizes(4096, 13696, 40, 32, 2, 128, 151552, attention_bias=True)

# Source: the modelling code and configuration classes of transformers 5.23; tests/unit/test_plan_shapes.py compares
# names, shapes and defaults with the modules that these build.
FAMILIES: Mapping[str, Family] = {
    "llama": Family(_LLAMA, _sizes(4096, 11008, 32, 32, None, None, 32000), mlp=_MLP_BIAS, fused=True),
    "mistral": Family(
        (*_attention(), *_PRE), _sizes(4096, 14336, 32, 32, 8, None, 32000, sliding_window=4096), fused=True
    ),
    "ministral3": Family((*_attention(), *_PRE), _sizes(4096, 14336, 34, 32, 8, 128, 131072)),
    "qwen2": Family((*_attention(True, False), *_PRE), _sizes(4096, 22016, 32, 32, 32, None, 151936), fused=True),
    "qwen3": Family((*_LLAMA, *_HEAD_NORMS), _sizes(4096, 22016, 32, 32, 32, 128, 151936), fused=True),
    "gemma": Family(_LLAMA, _sizes(3072, 24576, 28, 16, 16, 256, 256000, **_TIED)),
    "gemma2": Family(
        (*_attention("attention_bias"), *_AROUND),
        _sizes(2304, 9216, 26, 8, 4, 256, 256000, sliding_window=4096, sliding_every=2, **_TIED),
        fused=True,
    ),
    "gemma3_text": Family(
        (*_attention("attention_bias"), *_HEAD_NORMS, *_AROUND),
        _sizes(2304, 9216, 26, 8, 4, 256, 262208, sliding_window=4096, sliding_every=6, **_TIED),
        fused=True,
    ),
    "phi3": Family(
        (_linear("self_attn.qkv_proj", "Q+K+K", "D"), _linear("self_attn.o_proj", "D", "Q"), *_PRE),
        _sizes(3072, 8192, 32, 32, None, None, 32064),
        mlp=_PACKED_MLP,
        fused=True,
    ),
    "gpt2": Family(
        (*_norms("ln_1", "ln_2", bias=True), _conv1d("attn.c_attn", "Q+K+K", "D"), _conv1d("attn.c_proj", "D", "Q")),
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "n_positions": 1024, "vocab_size": 50257} | _TIED,
        mlp=(_conv1d("mlp.c_fc", "F", "D"), _conv1d("mlp.c_proj", "D", "F")),
        stem="transformer.",
        layers="h",
        embeddings="wte",
        norm=_norms("ln_f", bias=True),
        positions=True,
    ),
    "gpt_neox": Family(
        (
            *_norms("input_layernorm", "post_attention_layernorm", bias=True),
            _linear("attention.query_key_value", "Q+K+K", "D", "attention_bias"),
            _linear("attention.dense", "D", "Q", "attention_bias"),
        ),
        _sizes(6144, 24576, 44, 64, None, None, 50432, attention_bias=True),
        mlp=_plain("dense_h_to_4h", "dense_4h_to_h", bias=True),
        stem="gpt_neox.",
        embeddings="embed_in",
        norm=_norms("final_layer_norm", bias=True),
    ),
    "olmo": Family(_attention("attention_bias"), _sizes(4096, 11008, 32, 32, None, None, 50304), norm=()),
    "olmo2": Family(_OLMO2, _sizes(4096, 11008, 32, 32, None, None, 50304)),
    "olmo3": Family(_OLMO2, _sizes(4096, 11008, 32, 32, None, None, 50304, sliding_window=4096, sliding_every=4)),
    "starcoder2": Family(
        (*_attention("use_bias"), *_norms("input_layernorm", "post_attention_layernorm", bias=True)),
        _sizes(3072, 12288, 30, 24, 2, None, 49152, use_bias=True, **_TIED),
        mlp=_plain("c_fc", "c_proj", bias="use_bias"),
        norm=_norms("norm", bias=True),
    ),
    "smollm3": Family(_LLAMA, _sizes(2048, 11008, 36, 16, 4, None, 128256, **_TIED), mlp=_MLP_BIAS),
    "exaone4": Family(
        (*_attention(), *_HEAD_NORMS, *_POST),
        _sizes(4096, 16384, 32, 32, 32, None, 102400, sliding_window=4096, sliding_every=4),
    ),
    "seed_oss": Family(
        (*_attention("attention_bias", "attention_out_bias"), *_PRE),
        _sizes(4096, 27648, 64, 80, 8, 128, 155136, attention_bias=True),
        mlp=_MLP_BIAS,
    ),
    "glm": Family(_GLM, _GLM_SIZES, mlp=_PACKED_MLP),
    "glm4": Family((*_GLM, *_norms("post_self_attn_layernorm", "post_mlp_layernorm")), _GLM_SIZES, mlp=_PACKED_MLP),
    "granite": Family(_LLAMA, _sizes(4096, 11008, 32, 32, None, None, 32000), mlp=_MLP_BIAS),
    "ernie4_5": Family(
        (*_attention("use_bias"), *_PRE),
        _sizes(1024, 3072, 18, 16, 2, 128, 103424, **_TIED),
        mlp=_gated(bias="use_bias"),
    ),
    "arcee": Family(
        _LLAMA, _sizes(2560, 18432, 32, 32, None, None, 32000), mlp=_plain("up_proj", "down_proj", "mlp_bias")
    ),
    "apertus": Family(
        (*_attention("attention_bias"), *_HEAD_NORMS, *_norms("attention_layernorm", "feedforward_layernorm")),
        _sizes(4096, 14336, 32, 32, None, None, 131072),
        mlp=(
            *_plain("up_proj", "down_proj"),
            Part("mlp.act_fn.alpha_p", ("1",), "vector"),
            Part("mlp.act_fn.alpha_n", ("1",), "vector"),
        ),
    ),
    "hyperclovax": Family(
        (*_LLAMA, *_norms("post_norm1", "post_norm2", when="use_post_norm")),
        _sizes(4096, 11008, 32, 32, None, None, 32000, use_post_norm=True),
        mlp=_MLP_BIAS,
    ),
    "nanochat": Family(
        _attention("attention_bias"), _sizes(768, 8192, 12, 6, 6, None, 50304), mlp=_plain("fc1", "fc2"), norm=()
    ),
    "mixtral": Family(
        (*_attention(), *_PRE),
        _sizes(4096, 14336, 32, 32, 8, None, 32000, num_local_experts=8, num_experts_per_tok=2),
        sparse=_experts("F"),
    ),
    "qwen2_moe": Family(
        (*_attention("qkv_bias", False), *_PRE),
        _sizes(2048, 5632, 24, 16, 16, None, 151936, qkv_bias=True, shared_expert_intermediate_size=5632)
        | _QWEN_MOE
        | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
        sparse=_QWEN_EXPERTS,
        sparse_from="decoder_sparse_step",
    ),
    "qwen3_moe": Family(
        (*_LLAMA, *_HEAD_NORMS),
        _sizes(2048, 6144, 24, 32, 4, None, 151936)
        | _QWEN_MOE
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        sparse=_experts("M"),
        sparse_from="decoder_sparse_step",
    ),
    "olmoe": Family(
        (*_LLAMA, *_WIDE_NORMS),
        _sizes(2048, 2048, 16, 16, None, None, 50304, num_experts=64, num_experts_per_tok=8),
        sparse=_experts("F"),
    ),
    "granitemoe": Family(
        _LLAMA,
        _sizes(4096, 11008, 32, 32, None, None, 32000, num_local_experts=8, num_experts_per_tok=2),
        sparse=_experts("F", "block_sparse_moe", "router"),
    ),
    "deepseek_v2": Family(
        (*_LATENT, *_PRE),
        _sizes(4096, 11008, 32, 32, None, None, 102400, first_k_dense_replace=0, **_LATENT_SIZES)
        | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
        mlp=_MLP_BIAS,
        sparse=(*_experts("M"), *_gated("S", "mlp.shared_experts", "mlp_bias")),
        sparse_from="first_k_dense_replace",
    ),
    "deepseek_v3": Family(
        (*_LATENT, *_PRE),
        _sizes(
            7168, 18432, 61, 128, None, None, 129280, first_k_dense_replace=3, num_experts_per_tok=8, **_LATENT_SIZES
        )
        | {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048},
        sparse=(*_experts("M"), *_SHARED),
        sparse_from="first_k_dense_replace",
    ),
    "glm4_moe": Family(
        (*_GLM, *_norms("self_attn.q_norm", "self_attn.k_norm", dim="N", when="use_qk_norm")),
        _sizes(4096, 10944, 46, 96, 8, None, 151552, first_k_dense_replace=1, num_experts_per_tok=8)
        | {"n_routed_experts": 128, "n_shared_experts": 1, "moe_intermediate_size": 1408},
        sparse=(*_experts("M"), *_SHARED),
        sparse_from="first_k_dense_replace",
    ),
    "gpt_oss": Family(
        (*_attention("attention_bias"), *_PRE, Part("self_attn.sinks", ("H",), "vector")),
        _sizes(2880, 2880, 36, 64, 8, 64, 201088, attention_bias=True, sliding_window=128, sliding_every=2)
        | {"num_local_experts": 128, "num_experts_per_tok": 4},
        sparse=(
            Part("mlp.router.weight", ("E", "D"), "router", bias=True),
            Part("mlp.experts.gate_up_proj", ("E", "D", "F+F"), "experts", transposed=True),
            Part("mlp.experts.gate_up_proj_bias", ("E", "F+F"), "bias"),
            Part("mlp.experts.down_proj", ("E", "F", "D"), "experts", transposed=True),
            Part("mlp.experts.down_proj_bias", ("E", "D"), "bias"),
        ),
    ),
    "lfm2": Family(
        _LFM2,
        _sizes(2560, 12288, 32, 32, 8, None, 65536, conv_L_cache=3, **_TIED)
        | {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256},
        mixers=_LFM2_MIXERS,
        mlp=_LFM2_MLP,
        norm=_norms("embedding_norm"),
    ),
    "lfm2_moe": Family(
        _LFM2,
        _sizes(2048, 7168, 32, 32, 8, None, 65536, conv_L_cache=3, first_k_dense_replace=2, **_TIED)
        | {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 1792},
        mixers=_LFM2_MIXERS,
        mlp=_LFM2_MLP,
        sparse=_experts("M", "feed_forward"),
        sparse_from="first_k_dense_replace",
        norm=_norms("embedding_norm"),
    ),
    "qwen3_next": Family(
        _PRE,
        _sizes(2048, 5632, 48, 16, 2, 256, 151936, shared_expert_intermediate_size=512)
        | {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512}
        | _QWEN_MOE
        | _DELTA_SIZES,
        mixers={
            "linear_attention": _delta_net(("in_proj_qkvz", "k+k+v+v"), ("in_proj_ba", "h+h")),
            "full_attention": _DELTA_ATTENTION,
        },
        sparse=_QWEN_EXPERTS,
        sparse_from="decoder_sparse_step",
    ),
    "qwen3_5_text": Family(_PRE, _sizes(4096, 12288, 32, 16, 4, 256, 248320) | _DELTA_SIZES, mixers=_QWEN35_MIXERS),
    "qwen3_5_moe_text": Family(
        _PRE,
        _sizes(2048, None, 40, 16, 2, 256, 248320, shared_expert_intermediate_size=512)
        | {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
        | _DELTA_SIZES,
        mixers=_QWEN35_MIXERS,
        sparse=_QWEN_EXPERTS,
    ),
    "granitemoehybrid": Family(
        (*_PRE, _linear("shared_mlp.input_linear", "S+S", "D"), _linear("shared_mlp.output_linear", "D", "S")),
        _sizes(4096, 11008, 32, 32, None, None, 32000, num_local_experts=8, num_experts_per_tok=2)
        | {"shared_intermediate_size": 1024}
        | _MAMBA_SIZES,
        mixers={"linear_attention": _mamba2(), "full_attention": _attention("attention_bias")},
        mlp=(),
        sparse=_experts("F", "block_sparse_moe", "router"),
        sparse_from="none without",
    ),
    "bamba": Family(
        _BEFORE_FFN,
        _sizes(4096, 14336, 32, 32, 8, None, 128000) | _MAMBA_SIZES,
        mixers={"linear_attention": _mamba2(), "full_attention": _attention("attention_bias")},
        mlp=_FEED_FORWARD,
        norm=_FINAL,
    ),
    "falcon_h1": Family(
        _BEFORE_FFN,
        _sizes(4096, 14336, 32, 32, 8, None, 128000, mamba_d_ssm=1024) | _MAMBA_SIZES,
        mixers={
            "hybrid": (
                *_mamba2(out_bias="projectors_bias", norm="mamba_rms_norm", adaptable=False),
                *_attention("attention_bias"),
            )
        },
        mlp=_FEED_FORWARD,
        norm=_FINAL,
    ),
    "nemotron_h": Family(
        _norms("norm"),
        _sizes(4096, 21504, None, 32, 8, 128, 131072, n_routed_experts=8, num_experts_per_tok=2)
        | {"moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688}
        | {"mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 8, "mamba_d_conv": 4}
        | {"mamba_conv_bias": True, "layer_types": ("linear_attention", "moe", "full_attention", "mlp")},
        mixers={
            "linear_attention": _mamba2("mixer", "use_bias", "use_bias", adaptable=False),
            "full_attention": _attention(at="mixer"),
            "mlp": _plain("up_proj", "down_proj", "mlp_bias", at="mixer"),
            "moe": (
                Part("mixer.gate.weight", ("E", "D"), "router"),
                Part("mixer.experts.up_proj", ("E", "M", "l"), "experts"),
                Part("mixer.experts.down_proj", ("E", "l", "M"), "experts"),
                _linear("mixer.shared_experts.up_proj", "S", "D", "mlp_bias"),
                _linear("mixer.shared_experts.down_proj", "D", "S", "mlp_bias"),
                _linear("mixer.fc1_latent_proj", "l", "D", "mlp_bias", when="moe_latent_size"),
                _linear("mixer.fc2_latent_proj", "D", "l", "mlp_bias", when="moe_latent_size"),
            ),
        },
        mlp=(),
        embeddings="embeddings",
        norm=_norms("norm_f"),
        ties=False,
    ),
}
