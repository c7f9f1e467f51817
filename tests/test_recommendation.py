"""The control that a head recommends: chosen by reward at equal KL, with paired intervals, the simplest first."""

import json
import math

import pytest
import torch

from hf_recontrol import (
    ControlConfig,
    Recommendation,
    ReControlForCausalLM,
    SamplingSettings,
    Trial,
    ValueHead,
    fit,
    generate_rollouts,
    kl_divergence,
    paired_interval,
    recommend_control,
)
from hf_recontrol.evaluation import recommendation
from hf_recontrol.evaluation.recommendation import _chosen
from hf_recontrol.pipelines.run_report import _compared

from .conftest import make_head
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 69)]
SAMPLING = SamplingSettings(max_new_tokens=8, temperature=0.7, batch_size=32, seed=3)
# What the reward counts.
WORD = 50


def count_word(prompts, completions, **columns):
    return [float(text.split().count(f"w{WORD}")) for text in completions]


def controlled(static: float, advantage: float | None, ascent: float) -> ReControlForCausalLM:
    """A model whose head pushes towards (1) or away from (-1) the word, by each of its parts."""
    base = tiny_model("llama", dtype=torch.float32)
    base.generation_config.eos_token_id = 2
    rows = base.get_output_embeddings().weight.detach()
    push = rows[WORD] - rows.mean(0)
    head = make_head(
        hidden_size=16,
        hook_point="lm_head",
        head_sizes=[],
        static_vector=True,
        advantage_sizes=None if advantage is None else [4],
    )
    with torch.no_grad():
        head.static_vector.copy_(static * push)
        head.value_mlp.layers[0].weight.copy_(ascent * push)
        if advantage is not None:
            head.advantage_mlp.layers[-1].weight.mul_(1e-6)
            head.advantage_mlp.layers[-1].bias.copy_(advantage * push)
    return ReControlForCausalLM.from_model(base, head, ControlConfig())


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        ((1, 1, 1), "static"),
        ((-1, 1, 1), "advantage"),
        ((-1, -1, 1), "ascent"),
        ((1, -1, -1), "static"),
        ((-1, None, 1), "ascent"),
        ((1, None, 1), "static"),
    ],
)
def test_the_simplest_of_those_that_earn_most_is_recommended(parts, method):
    model = controlled(*parts)
    found = recommend_control(model, tiny_tokenizer(), PROMPTS, count_word, SAMPLING, target_kl=0.3)
    assert found.control.method == method
    base, *trials = found.trials
    assert base.control is None and base.kl == 0.0 and (found.prompts, found.responses) == (64, 64)
    assert [trial.control.method for trial in trials] == [
        name for name, part in zip(("static", "advantage", "ascent"), parts, strict=True) if part is not None
    ]
    for trial, part in zip(trials, [part for part in parts if part is not None], strict=True):
        gain, low, high = trial.gain
        assert trial.kl_low < trial.kl < trial.kl_high
        assert gain == pytest.approx((trial.reward[0] - base.reward[0]) / model.value_head.config.reward_std)
        assert low < gain < high and (low > 0 if part > 0 else gain < 0)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["control"] == found.control.to_dict()


def test_the_kl_is_that_of_the_controlled_models_own_samples_at_their_temperature():
    model = controlled(1, None, 1)
    found = recommend_control(model, tiny_tokenizer(), PROMPTS, count_word, SAMPLING, target_kl=0.3)
    for trial in found.trials[1:]:
        own = generate_rollouts(model, tiny_tokenizer(), PROMPTS, SAMPLING, control=trial.control)
        with model.use_control(trial.control):
            assert kl_divergence(model, own) == pytest.approx(trial.kl, rel=1e-5)
        assert trial.kl == pytest.approx(0.3, rel=0.1)
        at_one = [type(r)(**{**vars(r), "temperature": 1.0}) for r in own]
        with model.use_control(trial.control):
            assert kl_divergence(model, at_one) < 0.9 * trial.kl


def test_of_few_prompts_each_is_answered_several_times():
    found = recommend_control(
        controlled(1, None, 1), tiny_tokenizer(), PROMPTS[:10], count_word, SAMPLING, target_kl=0.3
    )
    assert (found.prompts, found.responses) == (10, 70)
    greedy = SamplingSettings(max_new_tokens=8, temperature=0.0)
    found = recommend_control(
        controlled(1, None, 1), tiny_tokenizer(), PROMPTS[:10], count_word, greedy, target_kl=0.3
    )
    assert (found.prompts, found.responses) == (10, 10)


def test_the_report_says_the_kl_with_its_interval():
    trials = [Trial(None, 0.0, [1.0]), Trial(ControlConfig("static", 2.0), 0.1, [3.0], (1.5, 1.0, 2.0), 0.08, 0.123)]
    [text] = _compared(Recommendation(trials[1].control, trials, 64, 64).to_dict()).values()
    assert "reward 3, +1.50 [+1.00, +2.00] standard deviations over the base, KL 0.10 [0.08, 0.12]" in text
    unknown = Trial(ControlConfig("static", 2.0), 0.1, [3.0], (1.5, 1.0, 2.0), -math.inf, math.inf)
    [text] = _compared(Recommendation(trials[1].control, [unknown], 1, 64).to_dict()).values()
    assert "KL 0.10 [unknown, unknown]" in text


def test_a_single_prompt_tells_nothing_so_the_simplest_control_stands():
    found = recommend_control(
        controlled(-1, None, 1), tiny_tokenizer(), PROMPTS[:1], count_word, SAMPLING, target_kl=0.3
    )
    assert found.control.method == "static"
    assert found.to_dict()["trials"][1]["gain"][1:] == [None, None]


def test_several_rewards_count_in_standard_deviations():
    """The ascent gains in the one that varies little, the static vector in the one with large numbers."""
    model = controlled(-1, None, 1)
    config = model.value_head.config
    config.num_objectives, config.reward_mean, config.reward_std = 2, [0.0, 0.0], [0.01, 1000.0]

    def without(prompts, completions, **columns):
        return [10.0 * (f"w{WORD}" not in text.split()) for text in completions]

    found = recommend_control(model, tiny_tokenizer(), PROMPTS, [count_word, without], SAMPLING, target_kl=0.3)
    assert found.control.method == "ascent" and len(found.trials[0].reward) == 2


def test_of_equal_controls_one_that_is_clearly_better_than_the_base_is_recommended():
    def of(method, gain):
        return Trial(ControlConfig(method, 1.0), 0.1, [0.0], gain)

    level = {number: 1.0 + number % 2 for number in range(20)}
    worse = {number: value - 1 for number, value in level.items()}
    unclear, clear = (0.1, -0.1, 0.3), (0.1, 0.05, 0.15)
    for trials, expected in (
        ([(of("static", unclear), level), (of("ascent", clear), level)], "ascent"),
        ([(of("static", clear), level), (of("ascent", clear), level)], "static"),
        ([(of("static", unclear), level), (of("ascent", unclear), level)], "static"),
        ([(of("static", clear), worse), (of("ascent", unclear), level)], "ascent"),
    ):
        assert _chosen(trials).method == expected


def test_controls_are_compared_on_prompts_that_all_have_rewards_for():
    """A reward that scores the static edit's responses only where they are good must not favour it."""

    def of(method):
        return Trial(ControlConfig(method, 1.0), 0.1, [0.0], (0.1, 0.05, 0.15))

    picky = dict.fromkeys(range(5), 3.0)
    whole = dict.fromkeys(range(5), 4.0) | dict.fromkeys(range(5, 40), 0.0)
    assert _chosen([(of("static"), picky), (of("ascent"), whole)]).method == "ascent"
    # A third one, with rewards for few prompts, changes on which ones the others are held against each other.
    few = dict.fromkeys(range(2), 0.0)
    split = dict.fromkeys(range(2), 3.0) | dict.fromkeys(range(2, 40), 5.0)
    assert _chosen([(of("static"), split), (of("advantage"), few), (of("ascent"), whole)]).method == "ascent"
    with pytest.raises(ValueError, match="a reward under every control"):
        _chosen([(of("static"), {1: 1.0}), (of("ascent"), {2: 1.0})])


@pytest.mark.usefixtures("recontrol_warnings")
def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(ValueError, match="No control could be compared at 1000 nats"):
        recommend_control(controlled(1, None, 1), tiny_tokenizer(), PROMPTS, count_word, SAMPLING, target_kl=1000.0)
    with pytest.raises(ValueError, match="No prompts"):
        recommend_control(controlled(1, None, 1), tiny_tokenizer(), [], count_word, SAMPLING)


def test_a_paired_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        values = torch.randn(64, generator=generator).exp() - math.exp(0.5)
        low, high = paired_interval(values.tolist())
        hits += low <= 0 <= high
    assert 170 <= hits <= 196  # a skewed distribution: somewhat below 95 %
    assert paired_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert paired_interval([1.0]) == (-math.inf, math.inf)
    values = torch.randn(100, generator=generator)
    low, high = paired_interval(values.tolist(), 0.9)
    assert (high - low) / 2 == pytest.approx(1.645 * float(values.std()) / 10, rel=0.1)
    for bad, match in ((([],), "No differences"), (([1.0], 1.0), "confidence")):
        with pytest.raises(ValueError, match=match):
            paired_interval(*bad)


OPTIONS = {"max_new_tokens": 8, "temperature": 1.5, "head_sizes": [8], "advantage_sizes": None, "num_epochs": 2}


@pytest.mark.usefixtures("recontrol_warnings")
def test_a_stop_between_figures_and_head_is_mended(tmp_path, monkeypatch):
    base = tiny_model("llama", dtype=torch.float32)
    base.generation_config.eos_token_id = 2

    def run(folder, target_kl):
        fit(base, PROMPTS, count_word, folder, tokenizer=tiny_tokenizer(), quiet=True, target_kl=target_kl, **OPTIONS)
        return ValueHead.from_pretrained(folder / "head").config.control

    expected = {kl: run(tmp_path / f"whole {kl}", kl) for kl in (0.1, 0.3)}
    assert expected[0.1] != expected[0.3]
    # Of a new head, and of one that recommends another control already.
    stop_at_the_head(monkeypatch, lambda: run(tmp_path / "stopped", 0.1))
    assert run(tmp_path / "stopped", 0.1) == expected[0.1]
    stop_at_the_head(monkeypatch, lambda: run(tmp_path / "stopped", 0.3))
    assert run(tmp_path / "stopped", 0.3) == expected[0.3]
    stop_at_the_head(monkeypatch, lambda: run(tmp_path / "stopped", 0.1))
    stop_at_the_head(monkeypatch, lambda: run(tmp_path / "stopped", 0.1))
    assert run(tmp_path / "stopped", 0.1) == expected[0.1]


def stop_at_the_head(monkeypatch, run):
    """Let a run die when it saves a head with a control."""
    save = ValueHead.save_pretrained

    def die(self, folder):
        if self.config.control is not None:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(ValueHead, "save_pretrained", die)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_what_cannot_be_compared_is_told_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(recommendation, "draw_rollouts", None)
    model = controlled(1, 1, 1)
    for rewards, options, said in (
        (lambda answers: answers, {}, "needs answers, which nothing provides"),
        ("column:topic", {}, "no column 'topic'"),
        ([3], {}, "functions or their names"),
        (count_word, {"target_kl": 0.0}, "`target_kl` must be above 0"),
    ):
        with pytest.raises(ValueError, match=said):
            recommend_control(model, tiny_tokenizer(), PROMPTS, rewards, SAMPLING, **options)
    with pytest.raises(TypeError, match="must be a controlled model"):
        recommend_control(model.unload(), tiny_tokenizer(), PROMPTS, count_word, SAMPLING)
