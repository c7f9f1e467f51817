"""The whole of it on a real model, SmolLM2-135M-Instruct. Slow: `make test-slow`."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import ControlConfig, ReControlForCausalLM, SamplingSettings, ValueHead, ValueHeadConfig
from hf_recontrol.collection.rollouts import generate_rollouts
from hf_recontrol.collection.scoring.responses import score_rollouts
from hf_recontrol.collection.scoring.vader import vader
from hf_recontrol.collection.states import collect_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.evaluation.strength import match_kl
from hf_recontrol.pipelines.demo import DEMO_PROMPTS, embedded_model
from hf_recontrol.training.advantage import fit_advantage
from hf_recontrol.training.value import train_value_head

from .conftest import at

pytestmark = pytest.mark.slow

PROMPTS = [
    "What is the capital of France?",
    "I am upset because my train was late again.",
    "Write two sentences about rain.",
    "How do I boil an egg?",
    "Tell me a joke about cats.",
    "Why is my bread so dense?",
]


@pytest.fixture(scope="module")
def smollm2():
    folder = embedded_model()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.fixture(params=["decoder_layer", "lm_head"])
def controlled(request, smollm2):
    model, tokenizer = smollm2
    torch.manual_seed(0)
    # The raw output of the last layer is some ten times larger than after the final norm.
    head = ValueHead(ValueHeadConfig(576, head_sizes=[256], hook_point=request.param))
    head.state_scale.fill_(20.0 if request.param == "decoder_layer" else 2.0)
    with torch.no_grad():
        head.value_mlp.layers[-1].weight.mul_(20)
    model = ReControlForCausalLM.from_model(model, head, ControlConfig(step_size=0.3, num_steps=20))
    yield model, tokenizer
    model.unload()


def test_the_base_answers_and_control_off_is_the_base(controlled):
    model, tokenizer = controlled
    answer = generate_rollouts(model, tokenizer, PROMPTS[:1], max_new_tokens=16, temperature=0.0)[0]
    assert answer.completion == "The capital of France is Paris." and answer.finished


def test_cached_batched_generation_is_the_teacher_forced_controlled_forward(controlled):
    model, tokenizer = controlled
    options = {"max_new_tokens": 24, "temperature": 0.0, "control": model.control}
    answers = generate_rollouts(model, tokenizer, PROMPTS, **options)
    changed = generate_rollouts(model, tokenizer, PROMPTS, **options | {"control": False})
    assert [a.completion for a in answers] != [c.completion for c in changed]
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([answer.prompt_ids + answer.completion_ids])).logits[0]
        logits = logits[len(answer.prompt_ids) - 1 : -1]
        drawn = logits[torch.arange(len(logits)), answer.completion_ids]
        # Greedy: what was drawn is the largest, up to the rounding of another batch.
        assert (drawn >= logits.amax(-1) - 1e-3).all()


def test_the_fast_ascent_is_the_autograd_ascent_on_real_states(controlled):
    model, tokenizer = controlled
    head, control = model.value_head, model.control
    rollouts = score_rollouts(
        generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8),
        lambda completions, **_: [0.0] * len(completions),
    )
    states = collect_states(model, rollouts, **at(head.config)).hidden.double()
    reference = ValueHead(head.config).double()
    reference.load_state_dict(head.state_dict())
    scaled = reference.scaled(states)
    moved = torch.zeros_like(scaled)
    for _ in range(control.num_steps):
        moved.requires_grad_(True)
        (gradient,) = torch.autograd.grad(reference.value_mlp(scaled + moved).sum(), moved)
        moved = (moved + control.step_size * gradient).detach()
    edit = model._recontrol.settings.controller.edit(states, control, control.step_size) - states
    torch.testing.assert_close(edit, moved * head.state_scale, rtol=1e-6, atol=1e-6)


def test_a_head_trained_here_raises_its_reward_on_prompts_that_it_has_not_seen(smollm2, recontrol_warnings):
    model, tokenizer = smollm2
    prompts = load_prompts(DEMO_PROMPTS, limit=208).rows
    training, unseen = prompts[:192], prompts[192:]
    options = {"max_new_tokens": 24, "temperature": 0.9}
    rollouts = score_rollouts(generate_rollouts(model, tokenizer, training, **options), vader)
    config = ValueHeadConfig(576, head_sizes=[256], hook_point="lm_head", advantage_sizes=[64])
    states = collect_states(model, rollouts, **at(config))
    head, _ = train_value_head(states, config, num_epochs=10, validation_split=0.2)
    fit_advantage(head, states, validation_split=0.2)
    controlled = ReControlForCausalLM.from_model(model, head)
    sampling = SamplingSettings(**options)
    control = match_kl(controlled, tokenizer, training[:64], ControlConfig("advantage", 5.0), 0.5, sampling).control
    options = {"max_new_tokens": 24, "temperature": 0.0}
    base, steered = (
        torch.tensor(
            vader([], [r.completion for r in generate_rollouts(controlled, tokenizer, unseen, **options, control=c)])
        )
        for c in (False, control)
    )
    controlled.unload()
    assert steered.mean() > base.mean() + 0.1
    assert all("held-out responses: these figures mean little" in message for message in recontrol_warnings)
