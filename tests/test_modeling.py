"""ReControlForCausalLM: what it is, what it refuses, what it leaves behind, and that nobody else notices."""

import copy
import gc
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from hf_recontrol import ControlConfig, HookPoint, ReControlForCausalLM, ValueHead, ValueHeadConfig
from hf_recontrol.control.controller import Controller

from .conftest import HIDDEN, LAYERS, STRONG, VOCAB, make_head, make_llama
from .fresh import run_fresh
from .versions import since

WEAKER = ControlConfig(step_size=0.5, num_steps=4)
ADVANTAGE = ControlConfig("advantage", step_size=3.0)
HOOK_DICTS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_with_kwargs", "_always_called"))]


def advantage_head(**kwargs) -> ValueHead:
    return make_head(hook_point="lm_head", advantage_sizes=[8], **kwargs)


def fingerprint(model: nn.Module) -> tuple:
    """The class, the attributes and every hook of every module."""
    return (
        type(model),
        set(model.__dict__),
        {name: [list(getattr(module, kind)) for kind in HOOK_DICTS] for name, module in model.named_modules()},
        {name: tensor._version for name, tensor in model.state_dict().items()},
    )


def tokens(model, input_ids, **kwargs) -> list[list[int]]:
    result = model.generate(input_ids, **({"max_new_tokens": 8, "do_sample": False} | kwargs))
    return result[:, input_ids.shape[1] :].tolist()


def logits(model, input_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids).logits


def reference_logits(base, head, input_ids, control) -> torch.Tensor:
    """The last layer's output edited by plain autograd ascent at every position; no wrapper, no cache."""
    edited = []

    def edit(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        d = torch.zeros_like(hidden)
        for _ in range(control.num_steps):
            leaf = d.detach().requires_grad_(True)
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(head(hidden.detach() + leaf).sum(), leaf)
            d = d + control.step_size * gradient
        edited.append(hidden + d)
        return (edited[0], *output[1:]) if isinstance(output, tuple) else edited[0]

    handle = base.model.layers[-1].register_forward_hook(edit)
    try:
        return logits(base, input_ids)
    finally:
        handle.remove()


@pytest.fixture
def model(llama, head) -> LlamaForCausalLM:
    return ReControlForCausalLM.from_model(llama, head, STRONG)


@pytest.fixture
def folders(tmp_path):
    """A base and a head that knows it, each in a folder."""
    base, head = tmp_path / "tiny-base", tmp_path / "tiny-head"
    make_llama().save_pretrained(base)
    make_head(base_model_name_or_path=str(base), control=STRONG).save_pretrained(head)
    return base, head


# What it is


def test_the_model_stays_an_instance_of_everything_it_was(model, llama):
    assert model is llama
    for cls in (ReControlForCausalLM, LlamaForCausalLM, PreTrainedModel, GenerationMixin, nn.Module):
        assert isinstance(model, cls)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(LlamaForCausalLM, name)
    assert type(model) is type(ReControlForCausalLM.from_model(make_llama(), make_head()))


def test_control_changes_the_logits_as_the_plain_ascent_does(llama, head, input_ids):
    llama.double()
    base = logits(llama, input_ids)
    expected = reference_logits(llama, copy.deepcopy(head).double(), input_ids, STRONG)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    torch.testing.assert_close(logits(model, input_ids), expected, rtol=1e-9, atol=1e-9)
    assert (expected - base).abs().max() > 0.1


@pytest.mark.parametrize(
    "off",
    [
        ControlConfig(num_steps=0),
        ControlConfig(step_size=0),
        ControlConfig(step_size=(0.0, 0.0)),
        ControlConfig(num_steps=0, plausibility=0.5),
    ],
)
def test_settings_that_do_nothing_give_the_base_bit_for_bit(llama, head, input_ids, off):
    expected = logits(llama, input_ids)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    assert not torch.equal(logits(model, input_ids), expected)
    model.control = off
    assert torch.equal(logits(model, input_ids), expected)


def test_control_false_generates_as_the_base_and_control_does_not(llama, head, input_ids):
    options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 6, "do_sample": False}
    expected = llama.generate(input_ids, **options)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    result = model.generate(input_ids, control=False, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(result.scores, expected.scores, strict=True))
    controlled = model.generate(input_ids, **options)
    assert not torch.equal(controlled.scores[0], expected.scores[0])


def test_a_call_may_name_its_own_control(model, input_ids):
    expected = {}
    for control in (STRONG, WEAKER):
        model.control = control
        expected[control] = tokens(model, input_ids)
    assert expected[STRONG] != expected[WEAKER]
    assert tokens(model, input_ids, control=STRONG) == expected[STRONG]
    assert model.control == WEAKER
    assert tokens(model, input_ids) == expected[WEAKER]


def test_the_head_is_not_part_of_the_base(llama, head):
    before = (
        list(llama.state_dict()),
        [name for name, _ in llama.named_parameters()],
        [name for name, _ in llama.named_modules()],
        [name for name, _ in llama.named_buffers()],
        llama.num_parameters(),
        llama.get_memory_footprint(),
    )
    model = ReControlForCausalLM.from_model(llama, head)
    after = (
        list(model.state_dict()),
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_modules()],
        [name for name, _ in model.named_buffers()],
        model.num_parameters(),
        model.get_memory_footprint(),
    )
    assert after == before
    assert model.value_head is head


def test_a_training_step_with_control_off_has_the_bases_gradients(llama, head, input_ids):
    llama.train()
    llama(input_ids, labels=input_ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    with model.disable_control():
        model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    assert all(parameter.grad is None for parameter in head.parameters())


def test_a_training_step_under_control_passes_gradients_to_the_whole_base_and_not_to_the_head(model, input_ids):
    model.train()
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in model.value_head.parameters())


# Loading


def test_a_head_that_knows_its_base_finds_it(folders, input_ids):
    base, head = folders
    model = ReControlForCausalLM.from_pretrained(head)
    expected = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    assert model.control == STRONG
    assert model.config._name_or_path == str(base)
    assert torch.equal(logits(model, input_ids), logits(expected, input_ids))


@pytest.mark.parametrize("form", ["folder", "text", "head", "subfolder", "first argument in a subfolder"])
def test_every_form_of_from_pretrained_gives_the_same_model(folders, form, input_ids):
    base, head = folders
    if form == "folder":
        model = ReControlForCausalLM.from_pretrained(base, value_head=head)
    elif form == "text":
        model = ReControlForCausalLM.from_pretrained(str(base), value_head=str(head))
    elif form == "head":
        model = ReControlForCausalLM.from_pretrained(base, value_head=ValueHead.from_pretrained(head))
    elif form == "subfolder":
        model = ReControlForCausalLM.from_pretrained(
            base, value_head=head.parent, value_head_subfolder=head.name, value_head_revision="main", revision="main"
        )
    else:
        model = ReControlForCausalLM.from_pretrained(head.parent, subfolder=head.name)
    expected = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    assert torch.equal(logits(model, input_ids), logits(expected, input_ids))


def test_a_base_in_a_subfolder_is_found_with_its_head(folders, input_ids):
    base, _ = folders
    model = ReControlForCausalLM.from_pretrained(
        base.parent, subfolder=base.name, value_head=make_head(), control=STRONG
    )
    expected = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    assert torch.equal(logits(model, input_ids), logits(expected, input_ids))


def test_the_class_of_a_controlled_model_makes_and_loads_what_the_base_s_class_would(folders, input_ids):
    """Trainers load a reference model by `type(model)`, and make models of its configuration."""
    base, head = folders
    model = ReControlForCausalLM.from_model(make_llama(seed=3), make_head(), STRONG)
    loaded = type(model).from_pretrained(base, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded, input_ids), logits(make_llama(), input_ids))
    for made in (type(model)(model.config), type(model)(config=model.config), type(model)._from_config(model.config)):
        assert type(made) is LlamaForCausalLM
    # With a head it is loaded under control.
    controlled = type(model).from_pretrained(base, value_head=head)
    expected = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    assert torch.equal(logits(controlled, input_ids), logits(expected, input_ids))


def test_from_model_takes_a_folder_and_from_pretrained_passes_keywords_on(folders):
    base, head = folders
    assert ReControlForCausalLM.from_model(make_llama(), str(head)).control == STRONG
    model = ReControlForCausalLM.from_pretrained(
        base, value_head=head, control=WEAKER, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu"
    )
    assert model.control == WEAKER and model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_control_defaults_to_the_heads_recommendation_then_to_the_defaults(llama):
    assert ReControlForCausalLM.from_model(llama, make_head(control=WEAKER)).control == WEAKER
    llama.unload()
    assert ReControlForCausalLM.from_model(llama, make_head(control=WEAKER), STRONG).control == STRONG
    llama.unload()
    assert ReControlForCausalLM.from_model(llama, make_head()).control == ControlConfig()


def test_a_head_that_knows_no_base_says_how_to_name_one(tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"does not say which model.*value_head='.*head'"):
        ReControlForCausalLM.from_pretrained(tmp_path / "head")


def test_a_control_that_the_head_cannot_do_is_refused_before_the_base_is_loaded(tmp_path):
    make_head().save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="advantage_sizes"):
        ReControlForCausalLM.from_pretrained("no/base", value_head=tmp_path / "head", control=ADVANTAGE)


def test_a_missing_head_folder_is_an_error_that_names_it(folders):
    base, _ = folders
    with pytest.raises(OSError, match="nothing/here/at/all"):
        ReControlForCausalLM.from_pretrained(base, value_head="nothing/here/at/all")


# Errors before anything is changed


def zero_output(head):
    with torch.no_grad():
        head.value_mlp.layers[-1].weight.zero_()
    return head


def untrained_advantage():
    return ValueHead(ValueHeadConfig(hidden_size=HIDDEN, hook_point="lm_head", advantage_sizes=[4]))


def with_nan(head):
    with torch.no_grad():
        head.value_mlp.layers[0].weight[0, 0] = torch.nan
    return head


BAD_HEADS = {
    "other width": (lambda: make_head(hidden_size=8), None, ValueError, f"width 8.*has {HIDDEN}"),
    "other width, named base": (
        lambda: make_head(hidden_size=8, base_model_name_or_path="org/other"),
        None,
        ValueError,
        "another base model .org/other",
    ),
    "layer too high": (lambda: make_head(layer=LAYERS), None, ValueError, f"layer {LAYERS}.*has {LAYERS}"),
    "layer too low": (lambda: make_head(layer=-LAYERS - 1), None, ValueError, f"layer -{LAYERS + 1}"),
    "untrained advantage": (untrained_advantage, ADVANTAGE, ValueError, "would do nothing"),
    "constant V": (lambda: zero_output(make_head()), None, ValueError, "would do nothing"),
    "no advantage part": (make_head, ADVANTAGE, ValueError, "advantage_sizes"),
    "NaN": (lambda: with_nan(make_head()), None, ValueError, "NaN"),
    "control is text": (make_head, "strong", TypeError, "`control` must be a ControlConfig"),
    "control is a number": (make_head, 0.5, TypeError, "`control` must be a ControlConfig"),
    "control is a dict": (make_head, {"step_size": 0.5}, TypeError, "`control` must be a ControlConfig"),
    "control is False": (make_head, False, TypeError, "`control`"),
    "plausibility below": (
        lambda: make_head(layer=0),
        ControlConfig(plausibility=0.1),
        ValueError,
        "`plausibility`.*layer 0",
    ),
    "no head": (lambda: None, None, TypeError, "`value_head` must be"),
    "a number": (lambda: 3, None, TypeError, "`value_head` must be"),
    "a module without a configuration": (lambda: nn.Linear(HIDDEN, 1), None, TypeError, "`value_head` must be"),
    "a class": (lambda: ValueHead, None, TypeError, "`value_head` must be"),
    "a missing folder": (lambda: "no/such/folder", None, OSError, "no/such/folder"),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_head_that_does_not_fit_is_refused_and_the_model_is_as_before(llama, input_ids, name):
    make, control, error, message = BAD_HEADS[name]
    before, expected = fingerprint(llama), logits(llama, input_ids)
    with pytest.raises(error, match=message):
        ReControlForCausalLM.from_model(llama, make(), control)
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, input_ids), expected)
    assert ReControlForCausalLM.from_model(llama, make_head()) is llama


def test_attaching_twice_is_refused_and_the_first_head_stays(model, head, input_ids):
    before, expected = fingerprint(model), logits(model, input_ids)
    with pytest.raises(ValueError, match=r"already has a value head.*unload"):
        ReControlForCausalLM.from_model(model, make_head(seed=5))
    assert fingerprint(model) == before and model.value_head is head
    assert torch.equal(logits(model, input_ids), expected)


def tiny_t5():
    config = T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (tiny_t5, ValueError, "encoder-decoder"),
        (lambda: LlamaModel(make_llama().config), ValueError, "no LM head"),
        (lambda: nn.Linear(2, 2), TypeError, "must be a transformers PreTrainedModel, got Linear"),
        (lambda: "gpt2", TypeError, "must be a transformers PreTrainedModel, got str"),
        (lambda: None, TypeError, "must be a transformers PreTrainedModel"),
        (lambda: LlamaForCausalLM, TypeError, "must be a transformers PreTrainedModel"),
    ],
    ids=["encoder-decoder", "no LM head", "another module", "text", "None", "a class"],
)
def test_a_model_of_another_kind_is_refused_and_as_before(make, error, message):
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        ReControlForCausalLM.from_model(model, make_head())
    assert before is None or fingerprint(model) == before


def test_a_head_of_another_base_that_fits_only_warns(llama, recontrol_warnings):
    llama.config._name_or_path = "org/this"
    ReControlForCausalLM.from_model(llama, make_head(base_model_name_or_path="org/other"))
    (message,) = recontrol_warnings
    assert "org/other" in message and "org/this" in message


@pytest.mark.parametrize("name", ["org/this", "this", "/some/where/this", "/some/where/this/"])
def test_a_base_that_was_moved_does_not_warn(llama, name):
    llama.config._name_or_path = name
    assert isinstance(
        ReControlForCausalLM.from_model(llama, make_head(base_model_name_or_path="org/this")), ReControlForCausalLM
    )


@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_hooks_are_added_all_or_none(llama, input_ids, monkeypatch, hook_point, failing):
    before, expected = fingerprint(llama), logits(llama, input_ids)
    calls = []

    def counted(register):
        def register_or_fail(self, *args, **kwargs):
            calls.append(self)
            if len(calls) == failing:
                raise RuntimeError("no more hooks")
            return register(self, *args, **kwargs)

        return register_or_fail

    with monkeypatch.context() as patch:
        for name in ("register_forward_pre_hook", "register_forward_hook"):
            patch.setattr(nn.Module, name, counted(getattr(nn.Module, name)))
        with pytest.raises(RuntimeError, match="no more hooks"):
            ReControlForCausalLM.from_model(llama, make_head(hook_point=hook_point))
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, input_ids), expected)


# Settings


@pytest.mark.parametrize(
    ("control", "error"), [(None, TypeError), (False, TypeError), (0.5, TypeError), (ADVANTAGE, ValueError)]
)
def test_the_control_setter_refuses_what_the_head_cannot_do_and_keeps_the_old(model, control, error):
    with pytest.raises(error):
        model.control = control
    assert model.control == STRONG


@pytest.mark.parametrize(
    ("control", "error"), [(True, TypeError), (0.5, TypeError), ({}, TypeError), (ADVANTAGE, ValueError)]
)
def test_generate_refuses_a_control_that_the_head_cannot_do_and_is_usable_after(model, input_ids, control, error):
    expected = tokens(model, input_ids)
    with pytest.raises(error, match=r"control|advantage"):
        model.generate(input_ids, control=control, max_new_tokens=2)
    assert tokens(model, input_ids) == expected


@pytest.mark.parametrize("num_values", [1, 3])
def test_step_sizes_that_are_not_one_for_each_prompt_are_refused(model, input_ids, num_values):
    control = ControlConfig(step_size=(0.5,) * num_values)
    with pytest.raises(ValueError, match=f"{num_values} values for 2"):
        model.generate(input_ids, control=control, max_new_tokens=2)
    model.control = control
    with pytest.raises(ValueError, match=f"{num_values} values for 2"):
        model(input_ids)
    model.control = STRONG
    assert torch.isfinite(logits(model, input_ids)).all()


def test_disable_control_nests_and_is_undone_after_an_exception(llama, head, input_ids):
    base = logits(llama, input_ids)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    controlled = logits(model, input_ids)
    with model.disable_control():
        assert torch.equal(logits(model, input_ids), base)
        with model.disable_control():
            assert torch.equal(logits(model, input_ids), base)
        assert torch.equal(logits(model, input_ids), base)
        with pytest.raises(KeyError), model.disable_control():
            raise KeyError
        assert torch.equal(logits(model, input_ids), base)
    assert torch.equal(logits(model, input_ids), controlled)
    with pytest.raises(KeyboardInterrupt), model.disable_control():
        raise KeyboardInterrupt
    assert torch.equal(logits(model, input_ids), controlled)


def test_inside_disable_control_a_call_may_name_its_control(model, input_ids):
    controlled, base = tokens(model, input_ids), tokens(model, input_ids, control=False)
    assert controlled != base
    with model.disable_control():
        assert tokens(model, input_ids) == base
        assert tokens(model, input_ids, control=STRONG) == controlled
        assert tokens(model, input_ids) == base


def test_disable_control_of_one_model_is_not_anothers(input_ids):
    one, other = (ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG) for _ in range(2))
    controlled = logits(other, input_ids)
    with one.disable_control():
        assert torch.equal(logits(other, input_ids), controlled)
        assert not torch.equal(logits(one, input_ids), controlled)


# Copies and moves


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch_save])
def test_a_copy_is_controlled_and_independent(model, input_ids, clone):
    expected, before = tokens(model, input_ids), logits(model, input_ids)
    other = clone(model)
    assert type(other) is type(model) and other.control == STRONG
    assert other.value_head is not model.value_head
    assert tokens(other, input_ids) == expected

    other.control = WEAKER
    assert model.control == STRONG
    with other.disable_control():
        assert torch.equal(logits(model, input_ids), before)
    with torch.no_grad():
        other.value_head.value_mlp.layers[0].weight.zero_()
        other.lm_head.weight.zero_()
    assert torch.equal(logits(model, input_ids), before)

    other.unload()
    assert type(other) is LlamaForCausalLM
    assert torch.equal(logits(model, input_ids), before)
    clean = fingerprint(make_llama())
    assert fingerprint(other)[2] == clean[2]
    # Attached again, the copy works like any other.
    ReControlForCausalLM.from_model(other, make_head(), STRONG)
    model.unload()
    assert fingerprint(model)[2] == clean[2]


def test_no_hook_of_a_copy_refers_to_the_original(model):
    other = copy.deepcopy(model)
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [hook for module in other.modules() for kind in kinds for hook in getattr(module, kind).values()]
    assert hooks and all(getattr(hook, "__self__", None) is other._recontrol for hook in hooks)


def test_an_unpickled_model_in_a_fresh_process_is_controlled(model, input_ids, tmp_path):
    torch.save({"model": pickle.dumps(model), "input_ids": input_ids}, tmp_path / "model.pt")
    script = f"""
import pickle, torch
torch.set_num_threads(1)
saved = torch.load({str(tmp_path / "model.pt")!r})
model = pickle.loads(saved["model"])
print(model.generate(saved["input_ids"], max_new_tokens=8, do_sample=False).tolist())
"""
    code, output, error = run_fresh(script, (), os.environ, timeout=120, cold=True)
    assert code == 0, error
    assert output.strip() == str(model.generate(input_ids, max_new_tokens=8, do_sample=False).tolist())


def test_compiled_attributes_of_the_base_are_dropped(llama, head):
    llama._compiled_call, llama._last_compile_config = (lambda *args: None), object()
    model = ReControlForCausalLM.from_model(llama, head)
    assert "_compiled_call" not in model.__dict__ and "_last_compile_config" not in model.__dict__
    model._compiled_call = lambda *args: None
    assert "_compiled_call" not in pickle.loads(pickle.dumps(model)).__dict__
    assert "_compiled_call" not in model.unload().__dict__


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("control", [STRONG, ADVANTAGE])
def test_a_model_moved_to_another_dtype_is_controlled_in_it(llama, input_ids, move, control):
    head = advantage_head()
    model = ReControlForCausalLM.from_model(llama, head, control)
    expected = logits(model, input_ids)
    getattr(model, move)()
    result = logits(model, input_ids)
    assert result.dtype == model.dtype
    assert head.state_mean.dtype == torch.float32
    tolerance = 0.15 * expected.abs().max() if move in ("half", "bfloat16") else 1e-4 * expected.abs().max()
    assert (result.float() - expected).abs().max() < tolerance
    with model.disable_control():
        assert (logits(model, input_ids).float() - result.float()).abs().max() > tolerance
    assert model.generate(input_ids, max_new_tokens=3).shape == (2, 7)


def test_a_model_moved_after_use_is_controlled_there(model, input_ids):
    expected = tokens(model, input_ids)
    model.to(torch.float64).to("cpu")
    assert tokens(model, input_ids) == expected
    model.to(torch.float32)
    assert tokens(model, input_ids) == expected


# Saving


def test_saving_writes_only_the_head_and_loading_gives_the_same_tokens(folders, tmp_path, input_ids):
    base, _ = folders
    model = ReControlForCausalLM.from_pretrained(base, value_head=make_head(seed=4), control=WEAKER)
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = ValueHeadConfig.from_json_file(tmp_path / "out" / "config.json")
    assert config.base_model_name_or_path == str(base)
    assert config.control == WEAKER
    loaded = ReControlForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.control == WEAKER
    assert tokens(loaded, input_ids) == tokens(model, input_ids)
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


def test_saving_with_a_state_dict_saves_the_base_as_the_base_would_and_the_head_inside(model, tmp_path, input_ids):
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(base) is LlamaForCausalLM
    assert base.config.architectures == ["LlamaForCausalLM"]
    with model.disable_control():
        assert torch.equal(logits(base, input_ids), logits(model, input_ids))
    loaded = ReControlForCausalLM.from_pretrained(tmp_path, value_head=tmp_path / "value_head")
    assert tokens(loaded, input_ids) == tokens(model, input_ids)


def test_per_row_step_sizes_are_not_saved_as_a_recommendation(model, tmp_path):
    model.control = ControlConfig(step_size=(0.5, 1.0))
    model.save_pretrained(tmp_path)
    assert ValueHeadConfig.from_json_file(tmp_path / "config.json").control is None


def test_a_module_that_is_no_value_head_cannot_be_saved(llama, tmp_path):
    class Towards(nn.Module):
        config = ValueHeadConfig(hidden_size=HIDDEN)

        def forward(self, hidden):
            return -hidden.square().sum(-1, keepdim=True)

    model = ReControlForCausalLM.from_model(llama, Towards())
    with pytest.raises(TypeError, match="Only a ValueHead can be saved, this head is a Towards"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Taking it off


def test_unload_restores_the_instance_completely(llama, head, input_ids):
    before, expected = fingerprint(llama), tokens(llama, input_ids)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    tokens(model, input_ids)
    model.values(input_ids)
    base = model.unload()
    assert base is llama
    assert fingerprint(base) == before
    assert tokens(base, input_ids) == expected
    assert not hasattr(base, "value_head") and not hasattr(base, "unload")
    assert tokens(pickle.loads(pickle.dumps(base)), input_ids) == expected
    assert type(copy.deepcopy(base)) is LlamaForCausalLM


def test_hooks_of_others_survive_attach_and_unload(llama, head, input_ids):
    seen = []
    llama.model.layers[-1].register_forward_hook(lambda *args: seen.append("layer"))
    llama.register_forward_pre_hook(lambda *args: seen.append("model"))
    model = ReControlForCausalLM.from_model(llama, head)
    logits(model, input_ids)
    logits(model.unload(), input_ids)
    assert Counter(seen) == {"layer": 2, "model": 2}


@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
def test_fifty_rounds_of_attach_and_unload_leak_nothing(llama, input_ids, hook_point):
    def one_round(index):
        head = make_head(seed=index, hook_point=hook_point)
        model = ReControlForCausalLM.from_model(llama, head, WEAKER)
        logits(model, input_ids)
        model.values(input_ids)
        model.unload()
        return weakref.ref(head)

    before, expected = fingerprint(llama), logits(llama, input_ids)
    heads = [one_round(index) for index in range(3)]
    gc.collect()
    objects = len(gc.get_objects())
    heads += [one_round(index) for index in range(50)]
    gc.collect()
    assert len(gc.get_objects()) - objects < 100
    assert all(head() is None for head in heads)
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, input_ids), expected)


def test_a_dropped_model_is_freed_with_its_head(input_ids):
    head = make_head()
    model = ReControlForCausalLM.from_model(make_llama(), head, WEAKER)
    tokens(model, input_ids)
    references = [
        weakref.ref(model),
        weakref.ref(head),
        weakref.ref(model._recontrol.settings.controller._last[2].gram),
    ]
    del model, head
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


# Interruptions


class StopStreamer(BaseStreamer):
    def __init__(self, error, after=3):
        self.error, self.left = error, after

    def put(self, value):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def end(self):
        pass


class StopProcessor(LogitsProcessor):
    def __init__(self, error):
        self.error, self.left = error, 3

    def __call__(self, input_ids, scores):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return scores


@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop")], ids=["interrupt", "exception"])
@pytest.mark.parametrize("place", ["streamer", "processor", "first layer", "last layer", "lm head"])
@pytest.mark.parametrize("plausibility", [0.0, 0.1])
def test_an_interrupted_generate_leaves_the_model_as_it_was(input_ids, hook_point, error, place, plausibility):
    model = ReControlForCausalLM.from_model(
        make_llama(), make_head(hook_point=hook_point), ControlConfig(step_size=1.0, num_steps=10)
    )
    prompt = input_ids[:1]
    expected, before = logits(model, prompt), fingerprint(model)
    expected_tokens, expected_base = tokens(model, prompt), tokens(model, prompt, control=False)
    options = {"control": ControlConfig(step_size=0.3, num_steps=4, plausibility=plausibility)}
    handle = None
    if place == "streamer":
        options["streamer"] = StopStreamer(error)
    elif place == "processor":
        options["logits_processor"] = [StopProcessor(error)]
    else:
        calls = []

        def stop(*args):
            calls.append(1)
            if len(calls) == 3:
                raise error

        module = {"first layer": model.model.layers[0], "last layer": model.model.layers[-1], "lm head": model.lm_head}
        handle = module[place].register_forward_hook(stop)
    with pytest.raises(type(error)):
        tokens(model, prompt, **options)
    if handle is not None:
        handle.remove()
    assert model.control == ControlConfig(step_size=1.0, num_steps=10)
    assert fingerprint(model) == before
    # A part of the model, then the whole: nothing of the broken forward is left.
    state = torch.randn(1, 5, HIDDEN)
    assert model.lm_head(state).shape == (1, 5, VOCAB)
    assert torch.equal(logits(model, prompt), expected)
    assert tokens(model, prompt) == expected_tokens
    assert tokens(model, prompt, control=False) == expected_base


def test_a_forward_that_fails_leaves_the_next_one_correct(model, input_ids):
    expected = logits(model, input_ids)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([[VOCAB + 5]]), logits_to_keep=1)
    assert torch.equal(logits(model, input_ids), expected)


# Threads


def test_threads_with_other_settings_do_not_disturb_each_other(input_ids):
    model = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    settings = [STRONG, WEAKER, False, ControlConfig(step_size=(2.0, 1.5), num_steps=20, plausibility=0.3)]
    expected = [tokens(model, input_ids, control=control) for control in settings]
    assert len({str(result) for result in expected}) == len(settings)
    results: list[list] = [[] for _ in settings]
    errors = []
    start = threading.Barrier(len(settings))

    def work(index):
        try:
            start.wait()
            for _ in range(10):
                results[index].append(tokens(model, input_ids, control=settings[index]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert results == [[result] * 10 for result in expected]


def test_values_and_disable_control_in_one_thread_do_not_reach_another(model, input_ids):
    expected, values = tokens(model, input_ids), model.values(input_ids)
    stop, errors, rounds = threading.Event(), [], []

    def read():
        try:
            while not stop.is_set():
                assert torch.equal(model.values(input_ids), values)
                with model.disable_control():
                    logits(model, input_ids)
                rounds.append(1)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        results = [tokens(model, input_ids) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert not errors and rounds
    assert results == [expected] * 20


# Values


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize(
    ("place", "which"),
    [({"layer": -1}, LAYERS - 1), ({"layer": 0}, 0), ({"layer": 1}, 1), ({"hook_point": "lm_head"}, None)],
)
@torch.no_grad()
def test_values_are_v_of_the_bases_states_in_the_rewards_own_units(llama, input_ids, place, which, objectives):
    states = []
    if which is None:
        handle = llama.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    else:
        handle = llama.model.layers[which].register_forward_hook(lambda module, args, output: states.append(output))
    expected_logits = logits(llama, input_ids)
    handle.remove()
    head = make_head(num_objectives=objectives, reward_mean=5.0, reward_std=3.0, **place)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    values = model.values(input_ids)
    assert values.shape == (2, 4, objectives)
    torch.testing.assert_close(values, head(states[0]) * 3.0 + 5.0)
    # Reading leaves nothing behind.
    with model.disable_control():
        assert torch.equal(logits(model, input_ids), expected_logits)


@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
@torch.no_grad()
def test_values_of_padded_rows_are_those_of_the_rows_alone(llama, hook_point):
    model = ReControlForCausalLM.from_model(llama, make_head(hook_point=hook_point), STRONG)
    rows = [torch.tensor([[1, 5, 9, 13, 4]]), torch.tensor([[1, 7, 3]])]
    padded = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.zeros(2, 5, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, -row.shape[1] :] = row
        mask[index, -row.shape[1] :] = 1
    values = model.values(padded, mask)
    for index, row in enumerate(rows):
        torch.testing.assert_close(values[index, -row.shape[1] :], model.values(row)[0], rtol=1e-4, atol=1e-4)


def test_values_can_be_trained_on(model, input_ids):
    model.values(input_ids).sum().backward()
    assert all(parameter.grad is not None for parameter in model.value_head.parameters())


def test_values_of_any_module_are_what_it_says(llama, input_ids):
    class FirstFeature(nn.Module):
        config = ValueHeadConfig(hidden_size=HIDDEN)

        def forward(self, hidden):
            return hidden[..., :1]

    states = []
    handle = llama.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    logits(llama, input_ids)
    handle.remove()
    model = ReControlForCausalLM.from_model(llama, FirstFeature(), WEAKER)
    with torch.no_grad():
        torch.testing.assert_close(model.values(input_ids), states[0][..., :1])


# Modules that change under the hooks


@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
@pytest.mark.parametrize("change", ["resize", "new lm head", "new embeddings", "new layer"])
def test_generate_follows_modules_that_were_replaced(input_ids, hook_point, change):
    model = ReControlForCausalLM.from_model(make_llama(), make_head(hook_point=hook_point), STRONG)
    if change == "resize":
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    elif change == "new lm head":
        model.lm_head = copy_without_hooks(model.lm_head)
    elif change == "new embeddings":
        model.set_output_embeddings(copy_without_hooks(model.lm_head))
    else:
        model.model.layers[-1] = copy_without_hooks(model.model.layers[-1])
    fresh = make_llama(vocab_size=model.config.vocab_size)
    fresh.load_state_dict(model.state_dict())
    base = tokens(fresh, input_ids)
    expected = tokens(ReControlForCausalLM.from_model(fresh, make_head(hook_point=hook_point), STRONG), input_ids)
    assert tokens(model, input_ids) == expected != base
    assert tokens(model, input_ids, control=False) == base
    assert fingerprint(model.unload())[2] == fingerprint(make_llama())[2]


def copy_without_hooks(module):
    module = copy.deepcopy(module)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module


# Pipelines and adapters


@pytest.fixture
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1} | {f"w{index}": index for index in range(2, VOCAB)}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>")


@since("5.20", "its pipeline calls generate in a way that it deprecates itself")
def test_a_text_generation_pipeline_takes_the_model_without_a_warning(llama, head, tokenizer, caplog):
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    expected_base = pipeline("text-generation", model=llama, tokenizer=tokenizer)("w5 w9 w13", **options)
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    caplog.clear()
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        controlled = pipe("w5 w9 w13", **options)
        base = pipe("w5 w9 w13", control=False, **options)
        batch = pipe(["w5 w9 w13", "w7"], batch_size=2, control=WEAKER, **options)
    finally:
        library.removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records]
    assert not any("not supported" in message or "hf_recontrol" in message for message in messages)
    assert base == expected_base != controlled
    assert len(batch) == 2
    assert pipe.model is model
    prompt = tokenizer("w5 w9 w13", return_tensors="pt").input_ids
    assert tokenizer.decode(tokens(model, prompt, max_new_tokens=6)[0]) == controlled[0]["generated_text"]


def lora(peft):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=32, target_modules=["q_proj", "down_proj"])


def set_adapter(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_a_peft_model_is_refused_with_the_way_out(llama, head):
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="get_base_model"):
        ReControlForCausalLM.from_model(peft.get_peft_model(llama, lora(peft)), head)


def test_an_adapter_added_before_or_after_is_active_under_control(input_ids):
    peft = pytest.importorskip("peft")
    plain = tokens(ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG), input_ids)

    before = peft.get_peft_model(make_llama(), lora(peft))
    set_adapter(before)
    adapted = tokens(before, input_ids)
    controlled = ReControlForCausalLM.from_model(before.get_base_model(), make_head(), STRONG)
    results = {"base of a PeftModel": tokens(controlled, input_ids), "PeftModel": tokens(before, input_ids)}
    assert tokens(controlled, input_ids, control=False) == adapted

    after = peft.get_peft_model(ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG), lora(peft))
    set_adapter(after)
    results["added after"] = tokens(after, input_ids)
    with after.get_base_model().disable_control():
        assert tokens(after, input_ids) == adapted

    native = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    native.add_adapter(lora(peft))
    set_adapter(native)
    results["transformers' own"] = tokens(native, input_ids)
    assert len({str(result) for result in results.values()}) == 1, results
    assert results["PeftModel"] not in (plain, adapted)


@pytest.mark.parametrize("target", ["lm_head", "down_proj"])
def test_an_adapter_on_the_module_that_is_hooked_is_followed(input_ids, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=32, target_modules=[target])
    expected = peft.get_peft_model(make_llama(), config)
    set_adapter(expected)
    base = ReControlForCausalLM.from_model(expected.get_base_model(), make_head(hook_point="lm_head"), STRONG)
    after = peft.get_peft_model(
        ReControlForCausalLM.from_model(make_llama(), make_head(hook_point="lm_head"), STRONG), config
    )
    set_adapter(after)
    assert tokens(after, input_ids) == tokens(base, input_ids) != tokens(base, input_ids, control=False)


def test_importing_the_package_imports_neither_torch_nor_an_extra():
    script = "import sys, hf_recontrol\nprint(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    script = (
        "import sys\n"
        "from hf_recontrol import ReControlForCausalLM, ValueHead\n"
        "print(sorted({'vaderSentiment', 'gguf', 'typer', 'hypothesis'} & sys.modules.keys()))"
    )
    code, output, error = run_fresh(script, (), os.environ, timeout=120, cold=True)
    assert code == 0, error
    assert output == "[]\n"


def test_saving_does_not_swallow_what_it_does_not_know(llama, head, tmp_path):
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "head", push_to_hub=True)
    assert not (tmp_path / "head").exists()


def test_a_base_named_without_a_head_says_so(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration of a model, not of a value head"):
        ReControlForCausalLM.from_pretrained(tmp_path)


def test_a_row_of_step_size_zero_is_the_base_also_under_plausibility(llama, input_ids):
    for hook_point in ("decoder_layer", "lm_head"):
        head = make_head(hook_point=hook_point)
        expected = llama(input_ids).logits
        control = ControlConfig(step_size=(0.0, 1.0), num_steps=5, plausibility=0.5)
        model = ReControlForCausalLM.from_model(llama, head, control)
        logits = model(input_ids).logits
        torch.testing.assert_close(logits[0], expected[0])
        assert logits[1].isinf().any()
        model.unload()


def test_a_linear_layer_of_another_kind_is_hooked_by_its_width(llama, input_ids):
    """As quantised linears are: no float weight to look at, only `in_features`."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            scale = linear.weight.detach().abs().amax() / 127
            self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))
            self.scale = scale

        def forward(self, x):
            return x @ (self.packed.to(x.dtype) * self.scale).T

    llama.lm_head = Packed(llama.lm_head)
    head = make_head(hook_point="lm_head")
    states = []
    handle = llama.lm_head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    llama(input_ids)
    handle.remove()
    expected = llama.lm_head(Controller(head).edit(states[0], STRONG, STRONG.step_size))
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    torch.testing.assert_close(model(input_ids).logits, expected)


@pytest.mark.parametrize("where", ["lm_head", "decoder_layer"])
def test_a_hook_point_is_found_once_and_carried(where, monkeypatch, input_ids):
    found = []
    find = HookPoint.find.__func__
    monkeypatch.setattr(HookPoint, "find", classmethod(lambda cls, *args: found.append(1) or find(cls, *args)))
    model = ReControlForCausalLM.from_model(make_llama(), make_head(hook_point=where), STRONG)
    assert len(found) == 1
    model(input_ids)
    with model.disable_control():
        model(input_ids)
    assert len(found) == 1
    assert (model.hook_point.layer, model.hook_point.width) == (None if where == "lm_head" else 2, 16)
    assert model.hook_point.is_last and copy.deepcopy(model).hook_point.module is not model.hook_point.module


def test_saving_a_model_leaves_its_live_head_as_it_was(tmp_path):
    head = make_head()
    model = ReControlForCausalLM.from_model(make_llama(), head, STRONG)
    model.config._name_or_path = "org/base"
    before = head.config.to_dict()
    model.save_pretrained(tmp_path)
    assert head.config.to_dict() == before and model.value_head is head
    saved = ValueHead.from_pretrained(tmp_path).config
    assert saved.control == STRONG and saved.base_model_name_or_path == "org/base"


def test_settings_of_a_block_reach_every_call_in_it_and_no_further(llama, head, input_ids):
    model = ReControlForCausalLM.from_model(llama, head, STRONG)
    controlled = model(input_ids).logits
    with model.use_control(False):
        assert model.active_control is None and not torch.equal(model(input_ids).logits, controlled)
        with model.use_control(STRONG):
            assert model.active_control == STRONG and torch.equal(model(input_ids).logits, controlled)
    assert model.active_control == STRONG and torch.equal(model(input_ids).logits, controlled)
    with pytest.raises(TypeError, match="`control` must be a ControlConfig"), model.use_control("strong"):
        pass


def test_values_follow_a_replaced_lm_head(input_ids):
    model = ReControlForCausalLM.from_model(make_llama(), make_head(hook_point="lm_head"), STRONG)
    expected = model.values(input_ids)
    model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    assert torch.equal(model.values(input_ids), expected)


def test_the_lm_head_s_input_is_edited_for_heads_that_act_there_alone(input_ids):
    model = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    with pytest.raises(ValueError, match="act at decoder layer 2, not at the LM head"):
        model.edit_lm_head_input(torch.zeros(1, 1, 16))


@pytest.mark.parametrize("asked", [{"control": False}, {"value_heads": {"default": 2.0}}])
def test_a_forward_that_is_given_a_control_says_how_it_is_said(model, input_ids, asked):
    # transformers' models take any keyword, so that it would be ignored.
    with pytest.raises(TypeError, match=r"is an argument of `generate`. For a forward use `with model.use_control"):
        model(input_ids, **asked)


class _Sharded:
    """What FSDP2's `fully_shard` puts before a model's class."""


def test_unload_under_a_class_that_others_derived_is_refused(llama, head, input_ids):
    base = type(llama)
    controlled = ReControlForCausalLM.from_model(llama, head)
    ours = type(controlled)
    controlled.__class__ = type("Sharded", (_Sharded, ours), {})
    with pytest.raises(ValueError, match="fully_shard"):
        controlled.unload()
    assert controlled.generate(input_ids, max_new_tokens=1).shape[1] == input_ids.shape[1] + 1
    assert type(type(controlled)(controlled.config)) is base
    controlled.__class__ = ours
    assert type(controlled.unload()) is base
