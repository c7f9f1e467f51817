"""Controlled decoding as a rival: equal to a naive loop without a cache, its KL exact, the base at strength 0."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from hf_recontrol import ControlConfig, ReControlForCausalLM, load_prompts
from hf_recontrol.collection.sampling import response_seed
from hf_recontrol.evaluation.comparison.answers import Drawer, kl_of
from hf_recontrol.evaluation.comparison.entries import Entry, Row
from hf_recontrol.evaluation.comparison.matching import with_strengths
from hf_recontrol.evaluation.rivals.kinds import make_rival
from hf_recontrol.evaluation.rivals.rival import Bench
from hf_recontrol.evaluation.strength import find_strength
from hf_recontrol.settings import CompareSettings, SamplingSettings

from .tiny_models import layers_of, lm_head_of, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15"]
TOP_K = 5


def early_words(completions):
    """More for words of small numbers: a reward of the text alone."""
    numbers = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [1 - sum(of) / (97 * len(of)) if of else 0.5 for of in numbers]


def bench_of(model, folder, rewards=None, **sampling):
    sampling = {"max_new_tokens": 5, "batch_size": 4} | sampling
    rewards = {"early_words": early_words} if rewards is None else rewards
    return Bench(model, tiny_tokenizer(), SamplingSettings(**sampling), rewards, folder)


def controlled(family="llama", hook_point="lm_head", dtype=torch.float32, layer=-1):
    """A model under a control that would change every answer, if it acted."""
    base = tiny_model(family, dtype)
    head = tiny_head(base, hook_point, layer)
    return ReControlForCausalLM.from_model(base, head, control=ControlConfig(step_size=3.0))


@torch.no_grad()
def naive(model, worth, rollout, strength, sampling, rest="keep", top_k=TOP_K, end_ids=(2,)):
    """Tokens and KLs of one response by forwards of whole texts, one at a time."""
    seed = response_seed(sampling.seed, rollout.prompt_number, rollout.sample)
    noise = np.random.Generator(np.random.SFC64(seed))
    temperature = 1.0 if sampling.temperature is None else sampling.temperature
    drawn, kls = [], []
    while len(drawn) < sampling.max_new_tokens and not (drawn and drawn[-1] in end_ids):
        with model.disable_control():
            logits = model(torch.tensor([rollout.prompt_ids + drawn]), use_cache=False).logits[0, -1].double()
        base = torch.softmax(logits / (temperature or 1.0), -1)
        candidates = base.argsort(descending=True)[:top_k].tolist()
        worths = {token: worth(rollout, [*drawn, token]) for token in candidates}
        worths = {token: value for token, value in worths.items() if value is not None}
        mass = sum(base[token] for token in worths)
        mean = sum(base[token] * value for token, value in worths.items()) / mass
        own = base.clone() if rest == "keep" else torch.zeros_like(base)
        for token in candidates:
            own[token] = base[token] * torch.exp(strength * (worths.get(token, mean) - mean))
        own /= own.sum()
        kls.append(float(sum(p * torch.log(p / q) for p, q in zip(own, base, strict=True) if p > 0)))
        if temperature:
            race = own.float() / torch.from_numpy(noise.standard_exponential(len(own), dtype=np.float32))
            drawn.append(int(race.argmax()))
        else:
            drawn.append(int(own.argmax()))
    return drawn, kls


def v_of(model, end_ids=(2,)):
    """V of the base's state behind a text, by a forward of all of it; of an end nothing."""

    def worth(rollout, drawn):
        if drawn[-1] in end_ids:
            return None
        seen = []
        if model.hook_point.layer is None:
            handle = lm_head_of(model).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        else:
            handle = layers_of(model)[model.hook_point.layer].register_forward_hook(
                lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
        with handle, model.disable_control():
            model(torch.tensor([rollout.prompt_ids + drawn]), use_cache=False)
        head = model.value_head
        return head(seen[0][0, -1].to(next(head.parameters()).dtype)).double().sum()

    return worth


def check(rival, model, worth, strength, sampling, **options):
    answers = rival.answer(load_prompts(PROMPTS), strength)
    assert len(answers) == len(PROMPTS) * sampling.num_samples
    for answer in answers:
        tokens, kls = naive(model, worth, answer.rollout, strength, sampling, **options)
        assert answer.rollout.completion_ids == tokens
        assert answer.kl == pytest.approx(kls, rel=2e-3, abs=2e-5)
    return answers


@pytest.mark.parametrize(
    ("family", "hook_point", "layer"),
    [
        ("llama", "lm_head", -1),
        ("llama", "decoder_layer", 1),
        ("gpt2", "decoder_layer", -1),
        ("gemma3_text", "lm_head", -1),
        ("mistral", "lm_head", -1),
        ("bloom", "decoder_layer", -1),
        ("falcon", "lm_head", -1),
        ("mamba", "lm_head", -1),
        ("mamba2", "lm_head", -1),
        ("xlstm", "lm_head", -1),
    ],
)
def test_cd_prefix_is_a_naive_loop_without_a_cache(tmp_path, family, hook_point, layer):
    model = controlled(family, hook_point, layer=layer)
    bench = bench_of(model, tmp_path)
    rival = make_rival("cd_prefix", bench, {"top_k": TOP_K})
    answers = check(rival, model, v_of(model), 3.0, bench.sampling)
    plain = bench.draw(load_prompts(PROMPTS))
    assert [a.rollout.completion_ids for a in answers] != [rollout.completion_ids for rollout in plain]


@pytest.mark.parametrize("rest", ["keep", "drop"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_both_kinds_are_a_naive_loop_at_any_temperature(tmp_path, temperature, rest):
    model = controlled()
    samples = 2 if temperature else 1
    bench = bench_of(model, tmp_path, temperature=temperature, num_samples=samples)
    settings = {"top_k": TOP_K, "rest": rest}
    check(make_rival("cd_prefix", bench, settings), model, v_of(model), 2.0, bench.sampling, rest=rest)

    def reward(rollout, drawn):
        text = " ".join(f"w{token}" for token in drawn if token > 4)
        config = model.value_head.config
        return torch.tensor((early_words([text])[0] - config.reward_mean) / config.reward_std)

    check(make_rival("cd", bench, settings), model, reward, 4.0, bench.sampling, rest=rest)


def test_cd_asks_the_reward_for_the_text_so_far_and_what_was_asked(tmp_path):
    seen = []

    def reward(prompts, completions, wanted):
        seen.extend(zip(prompts, completions, wanted, strict=True))
        counts = [text.split().count(word) for text, word in zip(completions, wanted, strict=True)]
        return [float(count) if text else None for text, count in zip(completions, counts, strict=True)]

    model = tiny_model("llama", torch.float32)
    bench = bench_of(model, tmp_path, {"reward": reward}, max_new_tokens=3)
    rows = [{"prompt": "w5 w6", "wanted": "w40"}, {"prompt": "w7", "wanted": "w50"}]
    prompts = load_prompts(rows)
    answers = make_rival("cd", bench, {"top_k": 97}).answer(prompts, 200.0)
    assert [answer.rollout.completion.split() for answer in answers] == [["w40"] * 3, ["w50"] * 3]
    assert {(prompt, wanted) for prompt, _, wanted in seen} == {("w5 w6", "w40"), ("w7", "w50")}
    assert {len(text.split()) for _, text, _ in seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["cd_prefix", "cd"])
def test_it_becomes_the_base_with_the_same_noise_and_a_kl_is_matched(tmp_path, kind):
    model = controlled()
    bench = bench_of(model, tmp_path, num_samples=3)
    asked = load_prompts(PROMPTS)
    rival = make_rival(kind, bench, {})
    weak = rival.answer(asked, 1e-9)
    assert [answer.rollout.completion_ids for answer in weak] == [r.completion_ids for r in bench.draw(asked)]

    def nats(strength):
        answers = rival.answer(asked, strength)
        return sum(sum(a.kl) for a in answers) / sum(len(a.kl) for a in answers)

    assert nats(1e-9) == pytest.approx(0.0, abs=1e-5)
    assert nats(find_strength(nats, rival.start, 0.05)) == pytest.approx(0.05, rel=0.1)


def test_its_strength_is_looked_for_on_few_prompts_first(tmp_path):
    bench = bench_of(controlled(), tmp_path, batch_size=24)
    rival, asked = make_rival("cd", bench, {}), []
    held_out = load_prompts([f"w{number} w5" for number in range(10, 34)])

    def answer(prompts, strength, drawn=rival.answer):
        asked.append(prompts.numbers)
        return drawn(prompts, strength)

    rival.answer = answer
    row = Row(Entry("far", "cd"), rival, None, target_kl=0.4)
    [found], _ = with_strengths(tmp_path, [row], bench, held_out)
    counts = [len(numbers) for numbers in asked]
    few = counts.count(3)
    assert few > 1 and counts == [3] * few + [24] * (len(counts) - few)
    answers = rival.answer(held_out, found.strength)
    tokens = sum(len(each.kl) for each in answers)
    assert sum(sum(each.kl) for each in answers) / tokens == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize("kind", ["cd_prefix", "cd"])
def test_ends_stop_strings_and_lengths_are_those_of_the_base(tmp_path, kind):
    model = controlled()
    ends = set(range(2, 60))
    config = GenerationConfig(do_sample=True, top_k=0, min_new_tokens=3, eos_token_id=sorted(ends))
    bench = bench_of(model, tmp_path, generation_config=config, max_new_tokens=8, num_samples=4)
    answers = make_rival(kind, bench, {}).answer(load_prompts(PROMPTS), 1.0)
    lengths = {len(answer.rollout.completion_ids) for answer in answers}
    assert min(lengths) >= 4 and len(lengths) > 1
    for answer in answers:
        rollout = answer.rollout
        assert not ends.intersection(rollout.completion_ids[:-1])
        assert rollout.finished == (rollout.completion_ids[-1] in ends)
        # The base is without `min_new_tokens` where others' KL is read.
        assert answer.kl is None
    bench = bench_of(model, tmp_path, stop_strings=("w7", "w8", "w3"), max_new_tokens=12, num_samples=4)
    answers = make_rival(kind, bench, {}).answer(load_prompts(PROMPTS), 1.0)
    assert any(answer.rollout.finished for answer in answers)
    assert all(not any(stop in answer.rollout.completion for stop in ("w7", "w8", "w3")) for answer in answers)
    assert all(len(answer.kl) == len(answer.rollout.completion_ids) for answer in answers)


def test_what_cannot_work_is_said_before_any_work(tmp_path):
    model = controlled()
    bench = bench_of(model, tmp_path)
    for kind in ("cd_prefix", "cd"):
        for settings, message in [
            ({"top_k": 1}, "`top_k` must be an integer of at least 2"),
            ({"top_k": 98}, "`top_k` must be at most 97"),
            ({"rest": "forget"}, "`rest` must be one of 'keep', 'drop'"),
            ({"top_p": 0.9}, f"{kind}.*top_p"),
        ]:
            with pytest.raises(ValueError, match=message):
                make_rival(kind, bench, settings)
        beams = bench_of(model, tmp_path, generation_config=GenerationConfig(num_beams=2, do_sample=False))
        with pytest.raises(ValueError, match="num_beams=2"):
            make_rival(kind, beams, {})
    with pytest.raises(ValueError, match="'cd_prefix' needs a value head"):
        make_rival("cd_prefix", bench_of(tiny_model("llama"), tmp_path), {})
    handle = (tmp_path / "open").open("w")
    with handle, pytest.raises(ValueError, match=r"reward\.fingerprint = 'version 1'"):
        make_rival("cd", bench_of(model, tmp_path, {"reward": lambda completions: [handle]}), {})


def test_what_answers_depend_on(tmp_path):
    model = controlled()
    bench = bench_of(model, tmp_path)
    other = bench_of(model, tmp_path, {"early_words": lambda completions: [0.0] * len(completions)})
    assert make_rival("cd", bench, {}).depends_on() != make_rival("cd", other, {}).depends_on()
    before = make_rival("cd_prefix", bench, {}).depends_on()
    assert before != make_rival("cd_prefix", bench, {"top_k": 11}).depends_on()
    with torch.no_grad():
        model.value_head.value_mlp.layers[0].weight.mul_(1.5)
    assert before != make_rival("cd_prefix", bench, {}).depends_on()


def test_a_response_that_a_reward_cannot_score_is_skipped_where_that_is_asked_for(tmp_path, recontrol_warnings):
    model = tiny_model("llama", torch.float32)

    def reward(completions):
        return [float("nan") if "w5" in text else 1.0 for text in completions]

    settings = CompareSettings(max_new_tokens=3, on_bad_rows="skip")
    bench = Bench(model, tiny_tokenizer(), settings, {"reward": reward}, tmp_path)
    answers = make_rival("cd", bench, {"top_k": 97}).answer(load_prompts(PROMPTS), 1.0)
    # All that is known is worth the same, and what is not known counts as that.
    assert [answer.rollout.completion_ids for answer in answers] == [
        rollout.completion_ids for rollout in bench.draw(load_prompts(PROMPTS))
    ]
    assert "texts that controlled decoding tries" in recontrol_warnings[0]


def test_without_a_cache_it_is_the_same(tmp_path):
    model = controlled()
    config = GenerationConfig(do_sample=True, top_k=0, use_cache=False)
    cached, whole = (
        make_rival("cd_prefix", bench_of(model, tmp_path, **options), {}).answer(load_prompts(PROMPTS), 2.0)
        for options in ({}, {"generation_config": config})
    )
    for one, other in zip(cached, whole, strict=True):
        assert one.rollout == other.rollout
        assert one.kl == pytest.approx(other.kl, rel=1e-3, abs=1e-5)


def test_with_an_instruction_its_kl_to_the_base_is_not_known(tmp_path):
    model = controlled()
    bench = bench_of(model, tmp_path)
    rival = make_rival("cd_prefix", bench, {})
    row = Row(Entry("both", "cd_prefix", instruction="w20", instruction_role="user"), rival, 1.0)
    answers, found, _ = Drawer(bench).draw(row, load_prompts(PROMPTS))
    assert [answer.rollout.prompt for answer in answers] == PROMPTS
    assert {kl_of(row, *pair) for pair in zip(answers, found, strict=True)} == {None}
