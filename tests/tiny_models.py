"""Tiny random causal language models of many families, made in code, and heads that change their tokens."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_NO_GQA = {key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "head_dim")}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "rotary_dim": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_STATE_SPACE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "state_size": 4,
    "conv_kernel": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]

# family: (model_type, keyword arguments of its configuration, where its decoder layers are)
FAMILIES: dict[str, tuple[str, dict, str]] = {
    "llama": ("llama", _COMMON, "model.layers"),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 4}, "model.layers"),
    "qwen2": ("qwen2", _NO_GQA | {"num_key_value_heads": 2}, "model.layers"),
    "qwen3": ("qwen3", _COMMON, "model.layers"),
    "gemma2": (
        "gemma2",
        {
            **_COMMON,
            "sliding_window": 4,
            "layer_types": _LOCAL_GLOBAL,
            "query_pre_attn_scalar": 4,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
        "model.layers",
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_COMMON,
            "sliding_window": 4,
            "layer_types": _LOCAL_GLOBAL,
            "query_pre_attn_scalar": 4,
        },
        "model.layers",
    ),
    "phi": ("phi", {**_NO_GQA, "num_key_value_heads": 2}, "model.layers"),
    "phi3": ("phi3", {**_COMMON, "sliding_window": None}, "model.layers"),
    "gpt2": ("gpt2", _GPT2, "transformer.h"),
    "gptj": ("gptj", _GPT2, "transformer.h"),
    "gpt_neo": (
        "gpt_neo",
        {
            **_NO_GQA,
            "num_layers": 3,
            "num_heads": 4,
            "window_size": 4,
            "attention_types": [[["global", "local", "global"], 1]],
        },
        "transformer.h",
    ),
    "gpt_neox": ("gpt_neox", _NO_GQA, "gpt_neox.layers"),
    "codegen": ("codegen", _GPT2, "transformer.h"),
    "opt": ("opt", {**_NO_GQA, "ffn_dim": 24, "word_embed_proj_dim": 16}, "model.decoder.layers"),
    "opt_projected": ("opt", {**_NO_GQA, "ffn_dim": 24, "word_embed_proj_dim": 12}, "model.decoder.layers"),
    "bloom": ("bloom", {**_NO_GQA, "n_layer": 3, "n_head": 4}, "transformer.h"),
    "falcon": ("falcon", {**_NO_GQA, "alibi": False, "new_decoder_architecture": False}, "transformer.h"),
    "mpt": (
        "mpt",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "n_heads": 4,
            "n_layers": 3,
            "expansion_ratio": 2,
            "max_seq_len": 64,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
        },
        "transformer.blocks",
    ),
    "olmo2": ("olmo2", _NO_GQA, "model.layers"),
    "cohere": ("cohere", {**_NO_GQA, "logit_scale": 0.5, "num_key_value_heads": 2}, "model.layers"),
    "granite": ("granite", {**_NO_GQA, "logits_scaling": 2.0, "residual_multiplier": 0.7}, "model.layers"),
    "mixtral": (
        "mixtral",
        {**_COMMON, "num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"},
        "model.layers",
    ),
    "mamba": ("mamba", _STATE_SPACE, "backbone.layers"),
    "falcon_mamba": ("falcon_mamba", _STATE_SPACE, "backbone.layers"),
    "mamba2": (
        "mamba2",
        {**_STATE_SPACE, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 4},
        "backbone.layers",
    ),
    "xlstm": (
        "xlstm",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,  # its cache wants a multiple of 64
            "num_hidden_layers": 3,
            "num_blocks": 3,
            "num_heads": 4,
            "qk_dim_factor": 1.0,
            "chunk_size": 4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "backbone.blocks",
    ),
    "llava": ("llava", {}, "model.language_model.layers"),
}

# Where the decoder layers are, by `config.model_type`: written down, so that no test finds them as the package does.
LAYERS = {model_type: path for model_type, _, path in FAMILIES.values()}
LAYERS["qwen2_vl"] = "model.language_model.layers"


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a tiny model."""
    return model.get_submodule(LAYERS[model.config.model_type])


def lm_head_of(model: PreTrainedModel) -> nn.Module:
    """The LM head of a tiny model."""
    # GPT-NeoX's name in older transformers, BioGPT's, RWKV's; most have the last.
    names = ("embed_out", "output_projection", "head", "lm_head")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that the most likely token varies by position and is no near tie."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():
        if "A_log" in name or "dt_" in name or name.endswith(".D"):
            continue  # the time constants of state-space models
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter is embedding:
            new = 0.3 * noise if tied else noise
        elif parameter.ndim > 1:
            new = (0.6 if tied else 0.3) * noise
        else:
            new = parameter.double() + 0.2 * noise
        parameter.data.copy_(new)


@cache
def _pristine(family: str, dtype: torch.dtype, seed: int, overrides: tuple) -> PreTrainedModel:
    # Some weights stay as transformers draws them, which must not depend on the tests that ran before.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _from_config(family, dtype, overrides)
    _randomise(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _from_config(family: str, dtype: torch.dtype, overrides: tuple) -> PreTrainedModel:
    model_type, kwargs, _ = FAMILIES[family]
    kwargs = {**kwargs, **dict(overrides)}
    if family == "llava":
        text = {**_COMMON, "model_type": "llama", **dict(overrides)}
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "projection_dim": 8,
        }
        config = AutoConfig.for_model("llava", text_config=text, vision_config=vision, image_token_index=96)
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    attn_implementation = kwargs.pop("attn_implementation", None)
    experts_implementation = kwargs.pop("experts_implementation", None)
    config = AutoConfig.for_model(model_type, **kwargs)
    if experts_implementation is not None:
        config._experts_implementation = experts_implementation
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> PreTrainedModel:
    """A fresh tiny random model of a family, the same for the same arguments. It has no end-of-sequence token."""
    return copy.deepcopy(_pristine(family, dtype, seed, tuple(sorted(overrides.items()))))


def prompts(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Random prompts of shape `(batch, length)` without token 0, which pads."""
    return torch.randint(1, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths as one left-padded batch with its mask."""
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(length - len(row)), torch.ones_like(row)]) for row in rows])
    return ids, mask


def states_at(model: PreTrainedModel, hook_point: str, layer: int = -1, ids: torch.Tensor | None = None):
    """The states of a plain model at a hook point, for some prompts."""
    seen = []
    if hook_point == "lm_head":
        handle = lm_head_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    else:
        handle = layers_of(model)[layer].register_forward_hook(
            lambda _, args, output: seen.append((output[0] if isinstance(output, tuple) else output).detach())
        )
    with handle, torch.no_grad():
        model(input_ids=prompts(4, 8, seed=5) if ids is None else ids)
    return seen[0]


def tiny_head(
    model: PreTrainedModel,
    hook_point: str = "decoder_layer",
    layer: int = -1,
    head_sizes: tuple[int, ...] = (24,),
    activation: str = "relu",
    num_objectives: int = 1,
    advantage: bool | None = None,
    seed: int = 0,
    control: ControlConfig | None = None,
) -> ValueHead:
    """
    A random head for a plain model, with a `state_mean` and a `state_scale` of the order of the model's own states, so
    that the same control is as strong in every family. At the LM head it has an advantage part, a static vector and a
    token bias.
    """
    states = states_at(model, hook_point, layer).double()
    width = states.shape[-1]
    advantage = hook_point == "lm_head" if advantage is None else advantage
    config = ValueHeadConfig(
        hidden_size=width,
        head_sizes=list(head_sizes),
        activation=activation,
        num_objectives=num_objectives,
        hook_point=hook_point,
        layer=layer,
        advantage_sizes=[20] if advantage else None,
        static_vector=advantage,
        token_bias_size=model.config.get_text_config(decoder=True).vocab_size if advantage else None,
        control=control,
    )
    head = ValueHead(config)
    generator = torch.Generator().manual_seed(seed + 100)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = states.square().mean().sqrt()
    with torch.no_grad():
        head.state_mean.copy_(0.3 * spread * normal(width))
        head.state_scale.copy_(spread * torch.exp(0.3 * normal(width)))
        for mlp in (head.value_mlp, head.advantage_mlp):
            for linear in mlp.layers if mlp is not None else ():
                linear.weight.copy_(normal(*linear.weight.shape) / linear.in_features**0.5)
                linear.bias.copy_(0.3 * normal(len(linear.bias)))
        head.value_mlp.layers[-1].weight.mul_(2)
        if head.advantage_mlp is not None:
            head.advantage_mlp.layers[-1].weight.mul_(2 * spread)
            head.advantage_mlp.layers[-1].bias.mul_(spread)
            head.static_vector.copy_(spread * normal(width))
            head.token_bias.copy_(normal(len(head.token_bias)))
    return head.to(states_at(model, hook_point, layer).dtype)
