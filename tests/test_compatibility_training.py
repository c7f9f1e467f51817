"""
The rows of docs/compatibility.md that are about training the base underneath: with control off it is trained as
without us, under control generation and log-probabilities are those of the controlled policy.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .reference import reference_control, reference_greedy, reference_logits
from .tiny_models import prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

datasets = pytest.importorskip("datasets")

CONTROL = ControlConfig(step_size=0.5, num_steps=5)
NEW = 6

# TRL still asks for gradient checkpointing by the name that transformers is about to drop.
as_trl_does = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
every_hook_point = pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])


def build(hook_point, **options):
    base = tiny_model("llama", torch.float32, **options)
    head = tiny_head(base, hook_point)
    controlled = ReControlForCausalLM.from_model(
        tiny_model("llama", torch.float32, **options), copy.deepcopy(head), CONTROL
    )
    return controlled, base, head


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def differ(found, other):
    return any(not torch.equal(found[name], tensor) for name, tensor in other.items())


COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


# Gradient checkpointing


@every_hook_point
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "control", [CONTROL, replace(CONTROL, plausibility=0.1), None], ids=["on", "plausible", "off"]
)
def test_gradient_checkpointing_changes_no_gradient(hook_point, use_reentrant, control):
    ids = prompts()
    model, base, head = build(hook_point)
    gradients = {}
    for checkpointing in (False, True):
        if checkpointing:
            # Its name before and since transformers 5.20.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.train()
        model.zero_grad()
        if control is None:
            with model.disable_control():
                logits = model(ids, use_cache=False).logits
        else:
            model.control = control
            logits = model(ids, use_cache=False).logits
        # Backward outside of the block: what is recomputed there must not depend on the settings in force.
        logits.masked_fill(logits.isinf(), 0).square().mean().backward()
        gradients[checkpointing] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.testing.assert_close(logits, reference_logits(base, head, ids, control=control), rtol=1e-4, atol=1e-4)
    for name, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], gradient, msg=name)


# Trainer, SFTTrainer


def rows():
    return datasets.Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in prompts(4)])


def texts():
    return datasets.Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"w{i} w9"}, {"role": "assistant", "content": f"w2{i} w3{i}"}]}
            for i in range(5, 9)
        ]
    )


def train(kind, model, folder, **options):
    if kind == "Trainer":
        args = TrainingArguments(str(folder), **(COMMON | options))
        trainer = Trainer(model, args, train_dataset=rows())
    else:
        trl = pytest.importorskip("trl")
        args = trl.SFTConfig(str(folder), **(COMMON | options))
        peft_config = None
        if kind == "SFTTrainer with LoRA":
            peft = pytest.importorskip("peft")
            peft_config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        trainer = trl.SFTTrainer(
            model, args, train_dataset=texts(), processing_class=tiny_tokenizer(chat=True), peft_config=peft_config
        )
    trainer.train()
    return trainer


@every_hook_point
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer", "SFTTrainer with LoRA"])
@as_trl_does
def test_trainers_train_the_base_underneath(kind, hook_point, tmp_path):
    model, base, head = build(hook_point)
    before = weights(base)
    expected = train(kind, base, tmp_path / "base")
    with model.disable_control():
        trained = train(kind, model, tmp_path / "off")
    assert [log.get("loss") for log in trained.state.log_history] == [
        log.get("loss") for log in expected.state.log_history
    ]
    found = weights(trained.model)
    assert_equal(found, weights(expected.model))
    if kind == "SFTTrainer with LoRA":
        assert any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    else:
        assert differ(found, before)
    assert_equal(weights(model.value_head), weights(head))

    # Under control the loss is that of the controlled policy.
    controlled, base, head = build(hook_point)
    under = train(kind, controlled, tmp_path / "on")
    assert under.state.log_history[0]["loss"] != expected.state.log_history[0]["loss"]
    base.train()
    with reference_control(base, head, CONTROL):
        if kind == "Trainer":
            reference = train(kind, base, tmp_path / "reference")
            assert under.state.log_history[0]["loss"] == pytest.approx(
                reference.state.log_history[0]["loss"], rel=1e-3
            )
    assert_equal(weights(controlled.value_head), weights(head))


def test_a_trainers_checkpoint_holds_base_and_head(tmp_path):
    model, _, _ = build("decoder_layer")
    with model.disable_control():
        train("Trainer", model, tmp_path / "run", save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    again = ReControlForCausalLM.from_pretrained(checkpoint, value_head=checkpoint / "value_head")
    assert_equal(weights(again), weights(model))
    model.eval()
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert again.generate(prompts(), **options).tolist() == model.generate(prompts(), **options).tolist()
    # Going on from the checkpoint ends where a run without a stop ends.
    whole, _, _ = build("decoder_layer")
    with whole.disable_control():
        expected = train("Trainer", whole, tmp_path / "whole", max_steps=3)
    resumed, _, _ = build("decoder_layer")
    with resumed.disable_control():
        args = TrainingArguments(str(tmp_path / "run"), **(COMMON | {"max_steps": 3}))
        Trainer(resumed, args, train_dataset=rows()).train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(weights(resumed), weights(expected.model))


# TRL's online trainers


def fused_log_probs(trainer, model, ids):
    """Log-probabilities of the tokens after the first, as TRL's trainers compute them."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs


@every_hook_point
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@as_trl_does
def test_online_trainers_generate_and_learn_under_control(kind, adapter, hook_point, tmp_path):
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    model, base, head = build(hook_point)
    tokenizer = tiny_tokenizer()
    seen = []

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.append((prompts, [list(ids) for ids in completion_ids]))
        return [float(len(set(ids))) + i for i, ids in enumerate(completion_ids)]

    config = getattr(trl, f"{kind}Config")(
        str(tmp_path),
        **(COMMON | {"max_steps": 1}),
        num_generations=2,
        max_completion_length=NEW,
        beta=0.0,
        generation_kwargs={"top_k": 1},  # as good as greedy, so that a reference can follow
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w5 w9 w13"}, {"prompt": "w7 w8 w11"}]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]) if adapter else None,
    )
    ids = prompts()
    for control in (CONTROL, None):
        expected = reference_logits(base, head, ids, control=control)[:, :-1].log_softmax(-1)
        expected = expected.gather(-1, ids[:, 1:, None])[..., 0]
        if control is None:
            with model.disable_control():
                found = fused_log_probs(trainer, trainer.model, ids)
        else:
            found = fused_log_probs(trainer, trainer.model, ids)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    before = weights(trainer.model)
    trainer.train()
    for texts, completions in seen:
        for text, completion in zip(texts, completions, strict=True):
            prompt = tokenizer(text, return_tensors="pt").input_ids
            tokens = reference_greedy(base, head, prompt, control=CONTROL, max_new_tokens=NEW)[0, prompt.shape[1] :]
            plain = reference_greedy(base, head, prompt, max_new_tokens=NEW)[0, prompt.shape[1] :]
            end = tokenizer.eos_token_id
            until = tokens.tolist().index(end) + 1 if end in tokens else NEW
            assert completion == tokens[:until].tolist() != plain[:until].tolist()
    assert seen and differ(weights(trainer.model), before)
    assert_equal(weights(model.value_head), weights(head))
    model.unload()
    assert not hasattr(model.forward, "unfused")


def test_a_head_put_on_a_model_in_a_trainer_is_followed_too():
    utils = pytest.importorskip("trl.trainer.utils")
    peft = pytest.importorskip("peft")
    base = tiny_model("llama", torch.float32)
    head = tiny_head(base, "lm_head")
    model = tiny_model("llama", torch.float32)
    utils.add_fused_lm_head(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    ReControlForCausalLM.from_model(adapted.get_base_model(), head, CONTROL)
    ids = prompts()
    expected = reference_logits(base, head, ids, control=CONTROL)[:, :-1].log_softmax(-1)
    for called in (model, adapted):
        found = fused_log_probs(None, called, ids)
        torch.testing.assert_close(found, expected.gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-3, atol=1e-3)
    model.control = replace(CONTROL, plausibility=0.1)
    for called in (model, adapted):
        with pytest.raises((ValueError, RuntimeError), match="plausibility"):
            fused_log_probs(None, called, ids)
    assert not model.base_model._forward_hooks


@as_trl_does
def test_an_online_trainer_with_continuous_batching(tmp_path):
    trl = pytest.importorskip("trl")
    model, base, head = build("decoder_layer")
    tokenizer = tiny_tokenizer()
    seen = []

    def reward(prompts, completion_ids, **kwargs):
        seen.extend(zip(prompts, [list(ids) for ids in completion_ids], strict=True))
        return [float(i) for i in range(len(completion_ids))]

    config = trl.GRPOConfig(
        str(tmp_path),
        **(COMMON | {"max_steps": 1}),
        num_generations=2,
        max_completion_length=NEW,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16},
        generation_kwargs={"top_k": 1},
    )
    dataset = datasets.Dataset.from_list([{"prompt": "w5 w9 w13"}, {"prompt": "w7 w8 w11"}])
    trl.GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=dataset, processing_class=tokenizer).train()
    for text, completion in seen:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        tokens = reference_greedy(base, head, prompt, control=CONTROL, max_new_tokens=NEW)[0, prompt.shape[1] :]
        assert completion == tokens[: len(completion)].tolist() and completion
    assert seen
