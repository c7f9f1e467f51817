"""
`base.generate(**inputs, custom_generate="user/head", trust_remote_code=True)`: generation under the control of the
value head in this repo (https://arxiv.org/abs/2406.05954), with transformers, torch and safetensors alone. It draws
the tokens that hf_recontrol draws, which is faster and knows more modes.
"""

import json
import math
import os
import re
import threading
from contextlib import ExitStack

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

REPO = None
DEFAULTS = {"method": "ascent", "step_size": 0.5, "num_steps": 30, "l2": 0.0, "plausibility": 0.0, "max_kl": None}
DEFAULTS |= {"target": None}
HIGHEST = {"step_size": 1e30, "num_steps": 10_000, "l2": 1e30, "plausibility": 1, "max_kl": 1e30}
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "silu": nn.functional.silu, "gelu": nn.functional.gelu}


def generate(model, value_head=None, control=None, **kwargs):
    """
    Args:
        model: the base, which stays as it is.
        value_head (`str`, *optional*): another repo or a folder with a head; default: this repo.
        control (`dict` or `False`, *optional*): settings that differ from the recommended ones, such as
            `{"step_size": 1.0}`; `False` for none.
        kwargs: as for `generate`; `revision`, `token` and `cache_dir` also say where the head is.
    """
    if hasattr(model, "_recontrol"):
        raise ValueError("hf_recontrol controls this model already: call `model.unload()` first, or generate with it.")
    config, tensors = load_head(value_head or REPO, kwargs)
    changed, recommended = control or {}, config["control"] or {}
    settings = DEFAULTS | recommended | changed
    check(config, tensors, settings)
    for name in ("num_steps", "l2") if settings["method"] != "ascent" else ():
        if settings[name] not in (DEFAULTS[name], recommended.get(name)):
            raise ValueError(
                f"`{name}` is for `method='ascent'`, and this is {settings['method']!r}, where it changes nothing: "
                "leave it out, or name the ascent and its step size too."
            )
    if "step_size" not in changed and changed.get("method") not in (None, recommended.get("method")):
        raise ValueError(
            f"This head recommends no step size for {changed['method']!r}: name one, `step_size`. That of another "
            "method is in other units."
        )
    no_steps = settings["method"] == "ascent" and settings["num_steps"] == 0
    no_steps = no_steps or 0 in (settings["step_size"], settings["max_kl"])
    if control is False or no_steps:
        return model.generate(**kwargs)
    asked = kwargs.get("generation_config") or model.generation_config
    scale = kwargs.get("guidance_scale", getattr(asked, "guidance_scale", None))
    if settings["plausibility"] and scale not in (None, 1):
        raise ValueError("`plausibility` forbids tokens, which so have no logits for `guidance_scale`: leave one out.")
    if "paged" in str(kwargs.get("cache_implementation") or getattr(asked, "cache_implementation", None)):
        raise ValueError("A paged cache generates in a thread of its own: hf_recontrol knows it, this file does not.")
    with ExitStack() as hooks:
        for handle in add_hooks(model, config, tensors, settings):
            hooks.callback(handle.remove)
        # Code that was compiled without hooks does not look for them.
        return model.generate(**kwargs | {"disable_compile": True})


def load_head(name, kwargs):
    """(configuration, tensors) of the head in a repo or folder."""
    if name is None:
        raise ValueError("This file does not know its repo: name the head, `value_head='user/head'`.")
    options = {key: kwargs.pop(key, None) for key in ("revision", "token", "cache_dir")}
    paths = [
        os.path.join(name, file) if os.path.isdir(name) else hf_hub_download(name, file, **options)
        for file in ("config.json", "model.safetensors")
    ]
    with open(paths[0], encoding="utf-8") as file:
        return json.load(file), load_file(paths[1])


def check(config, tensors, settings):
    """Raise `ValueError` for values that mean nothing here: the head's files may be anybody's."""
    if unknown := sorted(settings.keys() - DEFAULTS.keys()):
        raise ValueError(f"`control` holds {unknown}, expected some of {sorted(DEFAULTS)}.")
    for name, highest in HIGHEST.items():
        if name == "max_kl" and settings[name] is None:
            continue
        kinds = (int,) if name == "num_steps" else (int, float)
        if type(settings[name]) not in kinds or not 0 <= settings[name] <= highest:
            raise ValueError(f"`{name}` must be one number from 0 to {highest:g}, got {settings[name]!r}.")
    target = settings["target"] if isinstance(settings["target"], (list, tuple)) else [settings["target"]]
    if settings["target"] is not None and (
        settings["method"] != "ascent"
        or len(target) != config["num_objectives"]
        or not all(type(value) in (int, float) and abs(value) <= 1e30 for value in target)
    ):
        raise ValueError(f"`target` must be one number for each objective, for an ascent, got {settings['target']!r}.")
    if settings["method"] == "ascent" and settings["step_size"] * settings["l2"] >= 1:
        raise ValueError("`step_size * l2` must be below 1, or the steps run away.")
    for name, value, known in (
        ("format_version", config["format_version"], (1,)),
        ("hook_point", config["hook_point"], ("decoder_layer", "lm_head")),
        ("activation", config["activation"], tuple(ACTIVATIONS)),
        ("method", settings["method"], ("ascent", "advantage", "static")),
    ):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {known}, got {value!r}.")
    if settings["method"] == "advantage" and config["advantage_sizes"] is None:
        raise ValueError("This head has no advantage part: use method='ascent'.")
    if settings["method"] == "static" and "static_vector" not in tensors:
        raise ValueError("This head has no static vector: use method='ascent'.")
    sizes = dict.fromkeys(("state_mean", "state_scale", "static_vector"), config["hidden_size"])
    sizes["token_bias"] = config.get("token_bias_size")
    for name, size in sizes.items():
        if name in tensors and tensors[name].shape != (size,):
            raise ValueError(f"`{name}` has the shape {tuple(tensors[name].shape)}, config.json says otherwise.")
    if bad := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise ValueError(f"The head's tensors {bad} hold NaN or infinite values.")
    if not (tensors["state_scale"] > 0).all():
        raise ValueError("The head's tensor `state_scale` holds values that are not above 0.")


def mlp(tensors, part, activation, x):
    """One part of the head, `"value_mlp"` or `"advantage_mlp"`."""
    count = sum(name.startswith(f"{part}.layers.") for name in tensors) // 2
    for i in range(count):
        x = nn.functional.linear(x, tensors[f"{part}.layers.{i}.weight"], tensors[f"{part}.layers.{i}.bias"])
        x = ACTIVATIONS[activation](x) if i < count - 1 else x
    return x


def edit(hidden, config, tensors, settings):
    """u of h + u: `step_size * b`, `step_size * g(h)`, or `num_steps` of gradient ascent on V (or on -½‖V - target‖²),
    in the head's scaled coordinates. The tensors are where the states are."""
    if hidden.shape[-1] != config["hidden_size"]:
        raise ValueError(
            f"The head reads states of width {config['hidden_size']}, this model has {hidden.shape[-1]}: it was made "
            f"for another base ({config.get('base_model_name_or_path')})."
        )
    if torch.is_autocast_enabled(hidden.device.type):
        # In a shorter dtype it would be another edit than the package's.
        with torch.autocast(hidden.device.type, enabled=False):
            return edit(hidden, config, tensors, settings)
    alpha, scale = settings["step_size"], tensors["state_scale"]
    x = (hidden.detach().to(scale.dtype) - tensors["state_mean"]) / scale
    if settings["method"] == "static":
        return alpha * tensors["static_vector"].expand_as(x)
    if settings["method"] == "advantage":
        return alpha * mlp(tensors, "advantage_mlp", config["activation"], x)
    target = settings["target"]
    if target is not None:
        target, mean, std = (torch.tensor(v).to(x) for v in (target, config["reward_mean"], config["reward_std"]))
        target = ((target - mean) / std).expand(config["num_objectives"])
    # Tensors of an inference mode, in which `generate` may be called, can be saved for no backward.
    with torch.inference_mode(False), torch.enable_grad():
        x, step = x.clone(), torch.zeros_like(x)
        for _ in range(settings["num_steps"]):
            moved = (x + step).requires_grad_(True)
            value = mlp(tensors, "value_mlp", config["activation"], moved)
            value = value.sum() if target is None else -0.5 * (value - target).square().sum()
            step = step + alpha * (torch.autograd.grad(value, moved)[0] - 2 * settings["l2"] * step)
    return scale * step.detach()


def within(base, controlled, max_kl, masked):
    """Controlled logits, their change scaled down until KL(controlled || base) is at most `max_kl`."""
    own = base.float()
    log_base = torch.log_softmax(own, -1).masked_fill(masked, -math.inf)
    # Of larger ones, or where they overflowed, float32 cannot tell the KL from 0.
    shift = torch.where(torch.isfinite(own), controlled.float().clamp(-1e5, 1e5) - own, 0)

    def kl_at(share):
        moved = log_base + share * shift
        log_sum = moved.logsumexp(-1, keepdim=True)
        return share * ((moved - log_sum).exp() * shift).sum(-1, keepdim=True) - log_sum

    low, high = torch.zeros_like(own[..., :1]), torch.ones_like(own[..., :1])
    fits = kl_at(high) <= max_kl
    for _ in range(40):
        middle = (low + high) / 2
        below = kl_at(middle) <= max_kl
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(fits, controlled, (own + low * shift).to(controlled.dtype))


def warn_of_other_base(model, config):
    """Warn if the head was trained for another base, or other weights of it."""
    base, here = config.get("base_model_name_or_path"), model.config._name_or_path
    if (
        isinstance(base, str)
        and base
        and here
        and os.path.basename(base.rstrip("/")) != os.path.basename(here.rstrip("/"))
    ):
        logger.warning_once(
            f"This head was trained for {base!r} and is put on {here!r}: the widths fit, but its values may mean "
            "nothing there."
        )
    commits = config.get("base_model_revision"), getattr(model.config, "_commit_hash", None)
    if base == here and all(re.fullmatch("[0-9a-f]{40}", str(each)) for each in commits) and commits[0] != commits[1]:
        logger.warning_once(
            f"This head was trained for {base!r} at commit {commits[0]}, and this is {commits[1]}: if its weights are "
            "others, the head's values mean little there."
        )


def add_hooks(model, config, tensors, settings):
    """Hooks that edit the state at the head's place, mask what the base finds implausible, and keep within the KL."""
    warn_of_other_base(model, config)
    guarded = settings["plausibility"] or settings["max_kl"] is not None
    thread = threading.get_ident()

    def of_this_call(hook):
        """The hook, for the forwards of this thread alone: others may use the same model."""
        return lambda *given: hook(*given) if threading.get_ident() == thread else None

    placed = {}
    # Of the forward in progress, and how many rows of it go on as base and controlled ones, as a doubled batch.
    seen = {"has_run": False, "is_running": False, "doubled": 0}

    def begin(module, args):
        seen.update(has_run=True, is_running=True, doubled=0)

    def is_beside():
        """Whether `generate` calls the LM head alone, for drafts or contrasts of layers: these are the base's."""
        return seen["has_run"] and not seen["is_running"]

    def placed_for(hidden):
        """The head's tensors where the states are, moved there once in a call."""
        where = hidden.device, torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if where not in placed:
            with torch.inference_mode(False):
                placed[where] = {name: tensor.to(*where).clone() for name, tensor in tensors.items()}
        return placed[where]

    def edited(hidden):
        moved = (hidden + edit(hidden, config, placed_for(hidden), settings)).to(hidden.dtype)
        finite = torch.isfinite(moved).all(-1)
        # A base may give NaN at padded positions, which nothing reads.
        if not finite.all() and (torch.isfinite(hidden).all(-1) & ~finite).any():
            raise FloatingPointError(
                f"The {settings['method']} edit left the range of {hidden.dtype}: `step_size` "
                f"{settings['step_size']:g} is too large for this head."
            )
        if not guarded:
            return moved
        seen["doubled"] = len(hidden)
        return torch.cat([hidden, moved])

    def edit_head_input(module, args):
        if is_beside():
            return None
        return (edited(args[0]), *args[1:])

    def edit_layer_output(module, args, output):
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    def end(module, args, output):
        seen["is_running"], rows = False, seen["doubled"]
        if not rows:  # an early-exit draft, which ends before the last layer, has none
            return None
        base, logits = output.logits.chunk(2)
        masked = torch.zeros_like(base, dtype=torch.bool)
        if settings["plausibility"]:
            masked = base.float() < base.float().amax(-1, keepdim=True) + math.log(settings["plausibility"])
        if settings["max_kl"] is not None:
            logits = within(base, logits, settings["max_kl"], masked)
        output.logits = logits.masked_fill(masked, -math.inf)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(x[-rows:] if x is not None else None for x in output.hidden_states)
        return output

    def shift_logits(module, args, output):
        if is_beside():
            return None
        base, logits = output.chunk(2) if guarded else (output[:0], output)
        shift = settings["step_size"] * placed_for(logits)["token_bias"].float()
        added = logits.shape[-1] - len(shift)
        if added < 0:
            raise ValueError(f"The head's token bias is of {len(shift)} tokens, this model has {logits.shape[-1]}.")
        return torch.cat([base, (logits + nn.functional.pad(shift, (0, added))).to(logits.dtype)])

    if any(
        part._compiled_call_impl or hasattr(part.forward, "_torchdynamo_orig_callable") for part in model.modules()
    ):
        raise ValueError("This model is compiled, and compiled code may not look for hooks: use hf_recontrol.")
    if config["hook_point"] == "lm_head":
        lm_head = model.get_output_embeddings()
        handles = [lm_head.register_forward_pre_hook(of_this_call(edit_head_input))]
        if "token_bias" in tensors and settings["method"] != "ascent":
            handles.append(lm_head.register_forward_hook(of_this_call(shift_logits)))
    else:
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if config["layer"] not in (-1, count - 1):
            raise ValueError("A head on a layer other than the last needs hf_recontrol.")
        handles = [lists[0][-1].register_forward_hook(of_this_call(edit_layer_output))]
    handles.append(model.register_forward_pre_hook(of_this_call(begin)))
    return [*handles, model.register_forward_hook(of_this_call(end))]
