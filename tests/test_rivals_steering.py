"""Policies that are no control of a head: how far they are from the base, and the static steering vector."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from hf_recontrol import ReControlForCausalLM, TrainingRecord, load_prompts
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.data.rollouts import Rollout, load_rollouts
from hf_recontrol.evaluation.likelihoods import likelihoods
from hf_recontrol.evaluation.rivals.kinds import make_rival
from hf_recontrol.evaluation.rivals.rival import Bench, scored_by_prompt
from hf_recontrol.evaluation.strength import find_strength
from hf_recontrol.settings import SamplingSettings

from .tiny_models import layers_of, left_pad, prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15"]
GREEDY = SamplingSettings(max_new_tokens=6, temperature=0, batch_size=4)


def mean_token(completion_ids):
    return [sum(ids) / len(ids) for ids in completion_ids]


def bench_of(model, folder, sampling=GREEDY, num_samples=3, reward=mean_token):
    """A bench with scored rollouts of the model."""
    rollouts = folder / "rollouts"
    write_rollouts(
        rollouts,
        model,
        tiny_tokenizer(),
        load_prompts(PROMPTS),
        max_new_tokens=5,
        num_samples=num_samples,
        batch_size=8,
    )
    label_rollouts(rollouts, [reward])
    return Bench(model, tiny_tokenizer(), sampling, {reward.__name__: reward}, folder / "made", rollouts)


def nats(model, rival, strength, answers):
    found = likelihoods(model, [a.rollout for a in answers], lambda: rival.policy(strength), batch_size=4)
    return sum(each.kl for each in found) / sum(len(a.rollout.completion_ids) for a in answers)


def rollouts_of(*pairs):
    return [
        Rollout("asked", "said", prompt_ids, completion_ids, False, prompt_number=number)
        for number, (prompt_ids, completion_ids) in enumerate(pairs)
    ]


@contextmanager
def shifted(layer, vector):
    """A layer whose output is shifted, inside the block."""

    def shift(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    with layer.register_forward_hook(shift):
        yield


def test_the_base_is_read_outside_of_the_policy():
    model = tiny_model("llama")
    vector = torch.randn(16, dtype=torch.float64)
    rollouts = rollouts_of(([5, 6, 7], [8, 9]), ([11, 12], [13, 14, 15]))
    found = likelihoods(model, rollouts, lambda: shifted(layers_of(model)[1], vector), batch_size=2)
    for rollout, likelihood in zip(rollouts, found, strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        own = slice(len(rollout.prompt_ids) - 1, -1)
        with torch.no_grad():
            base = torch.log_softmax(model(ids).logits[0, own].float(), -1)
            with shifted(layers_of(model)[1], vector):
                policy = torch.log_softmax(model(ids).logits[0, own].float(), -1)
        tokens = torch.tensor(rollout.completion_ids)[:, None]
        assert likelihood.base == pytest.approx(float(-base.gather(-1, tokens).sum()), rel=1e-5)
        assert likelihood.kl == pytest.approx(float((policy.exp() * (policy - base)).sum()), rel=1e-4)
        assert likelihood.kl > 0.01


@pytest.mark.parametrize("num_samples", [1, 4])
def test_the_vector_is_the_difference_of_mean_states_of_good_and_bad_responses(tmp_path, num_samples):
    model = tiny_model("llama")
    bench = bench_of(model, tmp_path, num_samples=num_samples)
    rival = make_rival("steering_vector", bench, {"layer": 1, "share": 0.5})
    rival.prepare()
    groups = {}
    for rollout in load_rollouts(bench.rollouts):
        groups.setdefault(rollout.prompt_number if num_samples > 1 else 0, []).append(rollout)
    differences = []
    for group in groups.values():
        group.sort(key=lambda rollout: rollout.reward)
        means = []
        for rollout in group:
            seen = []
            with layers_of(model)[1].register_forward_hook(lambda _, args, output, seen=seen: seen.append(output)):
                model(torch.tensor([rollout.prompt_ids + rollout.completion_ids]))
            hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            means.append(hidden[0, len(rollout.prompt_ids) :].mean(0))
        half = len(group) // 2
        differences.append(torch.stack(means[half:]).mean(0) - torch.stack(means[:half]).mean(0))
    expected = torch.stack(differences).mean(0)
    at_one, at_none = (shift_of(model, rival, strength) for strength in (2.0, 1e-9))
    torch.testing.assert_close(at_one - at_none, 2 * expected, rtol=1e-5, atol=1e-6)


def shift_of(model, rival, strength):
    seen = []
    ids = prompts(1, 4)
    with rival.policy(strength), layers_of(model)[2].register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(ids)
    return seen[0][0, 0].detach()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "falcon", "gemma3_text", "mamba", "mixtral"])
def test_the_teacher_forced_policy_is_the_one_that_is_sampled_from(tmp_path, family):
    model = tiny_model(family, torch.float32)
    ids, mask = left_pad([row[length:] for length, row in enumerate(prompts(3, 6))])
    before = model(input_ids=ids, attention_mask=mask).logits
    bench = bench_of(model, tmp_path)
    rival = make_rival("steering_vector", bench, {})
    rival.prepare()
    strength = 3.0
    answers = rival.answer(load_prompts(PROMPTS), strength)
    plain = bench.draw(load_prompts(PROMPTS))
    assert [a.rollout.completion_ids for a in answers] != [rollout.completion_ids for rollout in plain]
    for answer in answers:
        rollout = answer.rollout
        with rival.policy(strength), torch.no_grad():
            logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
        assert logits[len(rollout.prompt_ids) - 1 : -1].argmax(-1).tolist() == rollout.completion_ids
    assert nats(model, rival, strength, answers) > 0
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_a_strength_is_found_for_a_kl_with_a_head_on_the_model(tmp_path):
    base = tiny_model("llama")
    model = ReControlForCausalLM.from_model(base, tiny_head(base))
    bench = bench_of(model, tmp_path, SamplingSettings(max_new_tokens=6, temperature=1.0))
    rival = make_rival("steering_vector", bench, {})
    asked = load_prompts(PROMPTS)
    strength = find_strength(lambda s: nats(model, rival, s, rival.answer(asked, s)), rival.start, 0.1)
    with model.disable_control():
        assert nats(model, rival, strength, rival.answer(asked, strength)) == pytest.approx(0.1, rel=0.1)


def test_the_vector_is_made_once_for_what_it_depends_on(tmp_path, monkeypatch):
    model = tiny_model("llama")
    bench = bench_of(model, tmp_path)
    make_rival("steering_vector", bench, {}).prepare()
    [path] = bench.folder.iterdir()
    content = path.read_bytes()
    again = make_rival("steering_vector", bench, {"layer": -2})
    monkeypatch.setattr("hf_recontrol.evaluation.rivals.steering.scored_by_prompt", None)
    again.prepare()
    assert again.layer == 1
    assert [path] == list(bench.folder.iterdir()) and path.read_bytes() == content
    other = make_rival("steering_vector", bench, {"layer": 0})
    assert other.depends_on() != again.depends_on()


@pytest.mark.parametrize("kind", ["steering_vector", "lora_dpo"])
def test_rollouts_of_other_weights_are_told(tmp_path, kind, recontrol_warnings):
    if kind == "lora_dpo":
        pytest.importorskip("trl")
    model = tiny_model("llama", torch.float32)
    bench = bench_of(model, tmp_path)
    make_rival(kind, bench, {})
    assert recontrol_warnings == []
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    make_rival(kind, bench, {})
    [said] = recontrol_warnings
    assert said.startswith(f"The rollouts in {bench.rollouts} are those of what the base was")
    assert "its weights or its dtype are others" in said


def minus_first(completion_ids):
    return [-100.0 * ids[0] for ids in completion_ids]


def test_responses_are_ranked_by_the_comparison_s_own_rewards(tmp_path, recontrol_warnings):
    model = tiny_model("llama")
    bench = bench_of(model, tmp_path)
    alone = make_rival("steering_vector", bench, {}).depends_on()
    label_rollouts(bench.rollouts, [minus_first, mean_token], again=True)
    scored = scored_by_prompt(bench, bench.rollouts, ["minus_first", "mean_token"])
    for reward, rollout in (each for responses in scored.values() for each in responses):
        assert reward == pytest.approx(mean_token([rollout.completion_ids])[0])
    # In the units of a head each reward has its own.
    head = tiny_head(model, num_objectives=2)
    head.config.reward_mean, head.config.reward_std = [1.0, 0.0], [2.0, 50.0]
    head.config.training = TrainingRecord(rewards=["mean_token", "minus_first"])
    both = replace(
        bench,
        model=ReControlForCausalLM.from_model(model, head),
        rewards={"mean_token": mean_token, "minus_first": minus_first},
    )
    for reward, rollout in scored_by_prompt(both, bench.rollouts, ["minus_first", "mean_token"])[0]:
        [mean], [first] = mean_token([rollout.completion_ids]), minus_first([rollout.completion_ids])
        assert reward == pytest.approx((mean - 1) / 2 + first / 50)
    assert make_rival("steering_vector", both, {}).depends_on() != alone
    assert not recontrol_warnings
    other = replace(bench, rewards={"another": mean_token})
    make_rival("steering_vector", other, {})
    assert "the comparison's rewards are another: the steering vector follows the former" in recontrol_warnings[-1]


def test_what_cannot_work_is_said_before_any_work(tmp_path):
    model = tiny_model("llama")
    bench = bench_of(model, tmp_path)
    for settings, message in [
        ({"layer": 3}, "`layer` must be at most 2"),
        ({"layer": "middle"}, "`layer` must be an integer"),
        ({"share": 0.6}, "`share` must be between 0 and 0.5"),
        ({"share": 0}, "`share` must be above 0"),
        ({"shares": 0.1}, "steering_vector.*shares"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_rival("steering_vector", bench, settings)
    with pytest.raises(ValueError, match="name their folder \\(`rollouts`\\)"):
        make_rival("steering_vector", replace(bench, rollouts=None), {})
    unscored = tmp_path / "unscored"
    write_rollouts(unscored, model, tiny_tokenizer(), load_prompts(PROMPTS), max_new_tokens=2)
    with pytest.raises(ValueError, match="recontrol label"):
        make_rival("steering_vector", bench, {"rollouts": str(unscored)})
    with pytest.raises(OSError, match="recontrol rollout"):
        make_rival("steering_vector", bench, {"rollouts": str(tmp_path / "nowhere")})


def test_responses_that_are_all_as_good_make_no_vector(tmp_path):
    model = tiny_model("llama")
    bench = bench_of(model, tmp_path, reward=lambda completions: [1.0] * len(completions))
    with pytest.raises(ValueError, match="no two responses of different reward"):
        make_rival("steering_vector", bench, {}).prepare()
