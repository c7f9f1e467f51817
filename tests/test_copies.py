"""Copies and saved models right after something replaced the module that a head's hook sits on, and plain forwards."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .reference import reference_logits
from .tiny_models import layers_of, prompts, tiny_head, tiny_model

CONTROL = ControlConfig(step_size=0.5, num_steps=5)
EXACT = {"rtol": 1e-4, "atol": 1e-4}
LORA = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8}


def llama():
    return tiny_model("llama", torch.float32)


def without_hooks(module):
    module = copy.deepcopy(module)
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    return module


def nothing(model):
    pass


def resize(model):
    torch.manual_seed(0)
    model.resize_token_embeddings(101, mean_resizing=False)


def set_output_embeddings(model):
    model.set_output_embeddings(without_hooks(model.lm_head))


def another_layer(model):
    layers_of(model)[-1] = without_hooks(layers_of(model)[-1])


def another_list_of_layers(model):
    model.model.layers = nn.ModuleList(map(without_hooks, model.model.layers))


def copied_with_their_hooks(model):
    """As PEFT does it: what is copied drags along a copy of the hooks on it."""
    model.lm_head = copy.deepcopy(model.lm_head)
    layers_of(model)[-1] = copy.deepcopy(layers_of(model)[-1])


def add_adapter(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["q_proj", "down_proj", "lm_head"]
    model.add_adapter(peft.LoraConfig(target_modules=targets, init_lora_weights=False, **LORA))


def get_peft_model(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, **LORA))


def modules_to_save(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA))
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(1.5)


def quantise(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda _, name: name.endswith("lm_head"))


def swap_linears(model):
    """As quantisers that put modules of their own in place."""
    linear = model.lm_head
    model.lm_head = nn.Linear(linear.in_features, linear.out_features, bias=False)
    model.lm_head.weight = linear.weight


CHANGES = {
    change.__name__: change
    for change in (
        nothing,
        resize,
        set_output_embeddings,
        another_layer,
        another_list_of_layers,
        copied_with_their_hooks,
        add_adapter,
        get_peft_model,
        modules_to_save,
        quantise,
        swap_linears,
    )
}


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CLONES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
every_change = pytest.mark.parametrize("change", list(CHANGES))
every_hook_point = pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])


def changed(change, hook_point):
    """A model that was changed under its head, its base changed in the same way, and the head."""
    head = tiny_head(llama(), hook_point)
    model = ReControlForCausalLM.from_model(llama(), copy.deepcopy(head), CONTROL)
    base = llama()
    CHANGES[change](model)
    CHANGES[change](base)
    return model, base, head


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def tokens(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=4, do_sample=False, **kwargs).tolist()


def expected_logits(base, head, hook_point, ids):
    """By naive hooks; the hook point of a wrapped LM head is the wrapper."""
    if hook_point == "decoder_layer":
        return reference_logits(base, head, ids, control=CONTROL)
    fresh = ReControlForCausalLM.from_model(copy.deepcopy(base), copy.deepcopy(head), CONTROL)
    return logits(fresh, ids)


@every_change
@every_hook_point
@pytest.mark.parametrize("clone", list(CLONES))
def test_a_copy_is_controlled_right_away(change, hook_point, clone):
    if change == "quantise" and clone in ("pickle", "torch.save"):
        pytest.skip("what torchao puts on a module cannot be pickled, with or without us")
    model, base, head = changed(change, hook_point)
    ids = prompts()
    other = CLONES[clone](model)
    expected = expected_logits(base, head, hook_point, ids)
    assert not torch.allclose(expected, logits(base, ids), atol=1e-2)
    torch.testing.assert_close(logits(other, ids), expected, **EXACT)
    torch.testing.assert_close(logits(model, ids), expected, **EXACT)
    fresh = ReControlForCausalLM.from_model(copy.deepcopy(base), copy.deepcopy(head), CONTROL)
    assert tokens(other, ids) == tokens(fresh, ids)
    assert tokens(other, ids, control=False) == tokens(base, ids)
    with other.disable_control():
        assert torch.equal(logits(other, ids), logits(base, ids)), "no hook of a copied module acts"
    stronger = ControlConfig(step_size=2.0, num_steps=5)
    fresh.control = other.control = stronger
    torch.testing.assert_close(logits(other, ids), logits(fresh, ids), **EXACT)
    assert torch.equal(logits(other.unload(), ids), logits(base, ids))


@pytest.mark.usefixtures("recontrol_warnings")  # with an adapter a head names no base
@every_hook_point
@pytest.mark.parametrize("change", ["resize", "set_output_embeddings", "another_layer", "add_adapter"])
def test_a_trainer_s_checkpoint_and_a_saved_head_hold_what_is_there(change, hook_point, tmp_path):
    model, base, head = changed(change, hook_point)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, bf16=False
    )
    rows = [{"input_ids": row, "labels": row} for row in prompts().tolist()]
    Trainer(model, args, train_dataset=rows).train()
    model.eval()
    ids = prompts()
    expected = expected_logits(base, head, hook_point, ids)
    torch.testing.assert_close(logits(model, ids), expected, **EXACT)
    checkpoint = tmp_path / "checkpoint-1"
    if change == "add_adapter":
        loaded = llama()
        loaded.load_adapter(str(checkpoint))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert loaded.lm_head.out_features == base.lm_head.out_features
    again = ReControlForCausalLM.from_model(loaded, checkpoint / "value_head", CONTROL)
    torch.testing.assert_close(logits(again, ids), expected, **EXACT)
    model.save_pretrained(tmp_path / "head")
    again.unload()
    once_more = ReControlForCausalLM.from_model(loaded, tmp_path / "head")
    assert once_more.control == CONTROL
    torch.testing.assert_close(logits(once_more, ids), expected, **EXACT)


def test_a_forward_that_passes_by_the_hook_point_is_an_error_and_no_silent_base():
    """As Liger's kernels, which read the LM head's weight instead of calling it."""
    model = ReControlForCausalLM.from_model(llama(), tiny_head(llama(), "lm_head"), CONTROL)

    def fused(self, input_ids, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        return type("Output", (dict,), {"logits": hidden @ self.lm_head.weight.T})()

    model.forward = partial(fused, model)
    with pytest.raises(RuntimeError, match="did not reach its hook point, the LM head: this forward passes by"):
        model(prompts())
    with model.disable_control():
        model(prompts())
