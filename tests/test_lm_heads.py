"""LM heads whose logits do not come of a plain weight: directions, the processor and TRL's fused forward follow."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from hf_recontrol import ControlConfig, ReControlForCausalLM, ReControlLogitsProcessor
from hf_recontrol.collection.rollouts import generate_rollouts
from hf_recontrol.collection.states import collect_states
from hf_recontrol.modeling.hook_points import lm_head_rows
from hf_recontrol.pipelines.fit import fit

from .reference import reference_edit
from .test_sampled_control import length
from .test_states import some_rollouts
from .tiny_models import layers_of, prompts, states_at, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

ADVANTAGE = ControlConfig("advantage", 0.5)
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def llama(**overrides):
    return tiny_model("llama", torch.float32, **overrides)


class Packed(nn.Module):
    """A linear layer without a `weight`, as some quantised ones are."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))

    @property
    def rows(self):
        return self.packed.float() * self.scale

    def forward(self, x):
        return x @ self.rows.to(x.dtype).T


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Curved(nn.Sequential):
    """No linear map."""


def packed(model, _):
    model.lm_head = Packed(model.lm_head)
    return model, model.lm_head.rows


def wrapped(model, _):
    """A module around a linear layer with a bias: no weight, no bias, no width of its own."""
    linear = nn.Linear(16, 97)
    model.lm_head = nn.Sequential(linear)
    return model, linear.weight.detach()


def parametrized(model, _):
    expected = 2 * model.lm_head.weight.detach()
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    return model, expected


def spectral(model, _):
    model.lm_head = torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(torch.arange(97)[:, None] / 40)
    return model, model.lm_head.weight.detach()


def subclass(model, _):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    linear, model.lm_head = model.lm_head, Scaled(16, 97, bias=False)
    model.lm_head.weight = linear.weight
    return model, 3 * linear.weight.detach()


def patched(model, _):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: -plain(x)
    return model, -model.lm_head.weight.detach()


def offloaded(model, folder):
    accelerate = pytest.importorskip("accelerate")
    expected = model.lm_head.weight.detach().clone()
    return accelerate.cpu_offload(model, execution_device="cpu"), expected


def on_disk(model, folder):
    pytest.importorskip("accelerate")
    expected = model.lm_head.weight.detach().clone()
    model.save_pretrained(folder / "base", max_shard_size="8KB")
    names = ["model.embed_tokens", "model.rotary_emb", "model.norm", *(f"model.layers.{i}" for i in range(3))]
    device_map = dict.fromkeys(names, "cpu") | {"lm_head": "disk"}
    loaded = type(model).from_pretrained(folder / "base", device_map=device_map, offload_folder=folder / "offload")
    assert loaded.lm_head.weight.is_meta
    return loaded, expected


def _lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, lora_dropout=0.5, target_modules=["lm_head"])
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return adapted


def lora(model, _):
    adapted = _lora(model)
    expected = copy.deepcopy(adapted).merge_and_unload().lm_head.weight.detach()
    assert not torch.allclose(expected, adapted.get_base_model().lm_head.weight, atol=1e-2)
    return adapted.get_base_model().eval(), expected


def lora_merged(model, folder):
    adapted = _lora(model)
    adapted.merge_adapter()
    return adapted.get_base_model().eval(), adapted.get_base_model().lm_head.base_layer.weight.detach()


def lora_off(model, folder):
    adapted = _lora(model)
    adapted.disable_adapter_layers()
    return adapted.get_base_model().eval(), model.lm_head.base_layer.weight.detach()


def saved_module(model, _):
    """PEFT trains a copy of the whole LM head."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=True
    )
    adapted = peft.get_peft_model(model, config)
    copied = adapted.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        copied.weight.mul_(1.5)
    return adapted.get_base_model().eval(), copied.weight.detach()


def quantised_by_torchao(model, _):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda _, name: name == "lm_head")
    assert type(model.lm_head.weight) is not nn.Parameter
    return model, model.lm_head.weight.dequantize()


KINDS = {
    kind.__name__: kind
    for kind in (
        packed,
        wrapped,
        parametrized,
        spectral,
        subclass,
        patched,
        offloaded,
        on_disk,
        lora,
        lora_merged,
        lora_off,
        saved_module,
        quantised_by_torchao,
    )
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


@every_kind
def test_rows_are_those_that_the_logits_use(kind, tmp_path):
    model, expected = KINDS[kind](llama(), tmp_path)
    torch.testing.assert_close(lm_head_rows(model), expected, **EXACT)


def test_a_plain_weight_is_not_copied():
    for model in (llama(), llama(tie_word_embeddings=True), tiny_model("phi", torch.float32)):
        assert lm_head_rows(model).data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    "kind", ["packed", "wrapped", "parametrized", "subclass", "offloaded", "quantised_by_torchao"]
)
def test_directions_are_made_of_them(kind, tmp_path):
    model, weight = KINDS[kind](llama(), tmp_path)
    rollouts = some_rollouts()
    states = collect_states(model, rollouts, hook_point="lm_head")
    expected = []
    for rollout in rollouts:
        if rollout.completion_ids:
            with torch.no_grad():
                logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
            policy = torch.softmax(logits[len(rollout.prompt_ids) - 1 : -1], -1)
            expected.append(weight[rollout.completion_ids] - policy @ weight)
    torch.testing.assert_close(states.directions, torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["offloaded", "on_disk"])
def test_responses_of_an_offloaded_base_are_those_of_the_base(kind, tmp_path):
    model, _ = KINDS[kind](llama(), tmp_path)
    options = {"max_new_tokens": 6, "seed": 3}
    found = generate_rollouts(model, tiny_tokenizer(), ["w5 w6 w7", "w8"], **options)
    assert found == generate_rollouts(llama(), tiny_tokenizer(), ["w5 w6 w7", "w8"], **options)


@every_kind
def test_the_processor_draws_what_the_controlled_model_draws(kind, tmp_path):
    model, _ = KINDS[kind](llama(), tmp_path)
    head = tiny_head(llama(), "lm_head")
    options = {"input_ids": prompts(), "max_new_tokens": 6, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True}
    processor = ReControlLogitsProcessor(model, head, ADVANTAGE)
    found = model.generate(**options, logits_processor=[processor])
    processor.remove()
    plain = model.generate(**options)
    controlled = ReControlForCausalLM.from_model(model, head, ADVANTAGE)
    expected = controlled.generate(**options)
    assert expected.sequences.tolist() != plain.sequences.tolist()
    assert found.sequences.tolist() == expected.sequences.tolist()
    for one, two in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, two.log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_an_lm_head_that_is_no_linear_map_is_refused_before_any_work(tmp_path):
    model = llama()
    model.lm_head = Curved(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 97))
    with pytest.raises(ValueError, match=r"a Curved, is no linear map of the state.*`directions=False`"):
        collect_states(model, some_rollouts(), hook_point="lm_head")
    with pytest.raises(ValueError, match="no linear map"):
        ReControlLogitsProcessor(model, tiny_head(llama(), "lm_head"), ADVANTAGE)
    with pytest.raises(ValueError, match="no linear map"):
        fit(model, [f"w{i}" for i in range(3, 43)], length, tmp_path / "run", tokenizer=tiny_tokenizer())
    assert not (tmp_path / "run" / "rollouts").exists()
    # V alone needs no rows, and the ascent no weight.
    states = collect_states(model, some_rollouts(), hook_point="lm_head", directions=False)
    assert states.directions is None
    head = tiny_head(llama(), "lm_head")
    ascent = ControlConfig(step_size=0.5, num_steps=3)
    ids = prompts()
    state = states_at(model, "lm_head", ids=ids)
    expected = model.lm_head((state + reference_edit(head, state, ascent)).float())
    controlled = ReControlForCausalLM.from_model(model, head, ascent)
    torch.testing.assert_close(controlled(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["adapter", "resize", "set_output_embeddings"])
def test_a_processor_says_that_the_lm_head_has_been_replaced(change):
    model = llama()
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"), ADVANTAGE)
    if change == "adapter":
        model = _lora(model)
    elif change == "resize":
        model.resize_token_embeddings(101, mean_resizing=False)
    else:
        model.set_output_embeddings(copy.deepcopy(model.lm_head))
    with pytest.raises(ValueError, match="has been replaced, as by an adapter or by resizing"):
        model.generate(input_ids=prompts(), max_new_tokens=2, logits_processor=[processor])


def test_trl_s_fused_forward_refuses_an_adapter_on_the_lm_head():
    """TRL multiplies by the weight below the adapter; the logits do not."""
    utils = pytest.importorskip("trl.trainer.utils")
    ids = prompts()
    for adapted in (False, True):
        model = ReControlForCausalLM.from_model(llama(), tiny_head(llama(), "lm_head").without_token_bias(), ADVANTAGE)
        if adapted:
            model = _lora(model).get_base_model()
        utils.add_fused_lm_head(model)
        if not adapted:
            assert model(ids, labels=ids, fused_lm_head=True).log_probs.isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"TRL multiplies by the weight of the LM head, a Linear, but.*adapter"):
            model(ids, labels=ids, fused_lm_head=True)


def test_dropout_of_an_adapter_is_not_taken_for_its_weight():
    adapted = _lora(llama()).train()
    expected = copy.deepcopy(adapted).merge_and_unload().lm_head.weight.detach()
    base = adapted.get_base_model()
    torch.testing.assert_close(lm_head_rows(base), expected, **EXACT)
    assert base.lm_head.lora_dropout["default"].training and layers_of(base)[0].training


def test_a_step_size_for_each_row_goes_through_such_a_head_too(tmp_path):
    model, _ = wrapped(llama(), tmp_path)
    head, control = tiny_head(llama(), "lm_head"), replace(ADVANTAGE, step_size=(0.0, 0.5))
    processor = ReControlLogitsProcessor(model, head, control)
    options = {"input_ids": prompts(), "max_new_tokens": 6, "do_sample": False}
    found = model.generate(**options, logits_processor=[processor]).tolist()
    plain = model.generate(**options).tolist()
    assert found[0] == plain[0] and found[1] != plain[1]
