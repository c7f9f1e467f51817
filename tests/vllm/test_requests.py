"""What requests ask for is what they get, whoever is beside them in the batch."""

import random

import pytest
import torch

from hf_recontrol import ControlConfig

vllm = pytest.importorskip("vllm")
pytest.importorskip("vllm.exceptions")

from .conftest import ASCENT, POLITE  # noqa: E402

# What a request says, and the same for our wrapper.
ASKED = [
    ({}, {}),
    ({"control": False}, {"control": False}),
    ({"control": {"step_size": 0.4}}, {"control": ControlConfig(step_size=0.4, num_steps=10)}),
    ({"control": {"num_steps": 3}}, {"control": ControlConfig(step_size=1.0, num_steps=3)}),
    ({"control": {"l2": 0.3}}, {"control": ControlConfig(step_size=1.0, num_steps=10, l2=0.3)}),
    (
        {"control": {"target": 0.5, "step_size": 0.05}},
        {"control": ControlConfig(step_size=0.05, num_steps=10, target=0.5)},
    ),
    ({"control": {"plausibility": 0.2}}, {"control": ControlConfig(step_size=1.0, num_steps=10, plausibility=0.2)}),
    ({"control": {"max_kl": 0.1}}, {"control": ControlConfig(step_size=1.0, num_steps=10, max_kl=0.1)}),
    ({"control": {"max_kl": 0.3}}, {"control": ControlConfig(step_size=1.0, num_steps=10, max_kl=0.3)}),
    (
        {"control": {"method": "static", "step_size": 0.5}},
        {"control": ControlConfig(method="static", step_size=0.5)},
    ),
    ({"recontrol_model": "tiny:polite"}, {"control": POLITE, "value_heads": {"polite": 1.0}}),
    (
        {"recontrol_model": "tiny:polite", "control": '{"step_size": 0.7}'},
        {"control": ControlConfig(method="advantage", step_size=0.7), "value_heads": {"polite": 1.0}},
    ),
    ({"value_heads": {"default": 0.5, "polite": -0.5}}, {"value_heads": {"default": 0.5, "polite": -0.5}}),
    ({"value_heads": {"default": 1, "polite": 2}}, {"value_heads": {"default": 1.0, "polite": 2.0}}),
    ({"value_heads": {"default": 0}, "somebody": {"else": [1]}}, {"control": False}),
]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(5, 97) for _ in range(drawn.randrange(2, 12))] for _ in range(count)]


def greedy(tokens: int = 8, **changes) -> "vllm.SamplingParams":
    return vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **changes)


def answers(engine, requests, params) -> list[list[int]]:
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in requests], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_every_setting_in_one_batch_says_what_our_wrapper_says_alone(engine, says):
    requests = [(prompt, asked) for asked in ASKED for prompt in prompts(3)]
    random.Random(1).shuffle(requests)
    given = answers(engine, [p for p, _ in requests], [greedy(extra_args=extra) for _, (extra, _) in requests])
    for (prompt, (extra, ours)), tokens in zip(requests, given, strict=True):
        assert tokens == says(prompt, **ours), extra
    changed = [says(prompt, **ours) != says(prompt, control=False) for prompt, (_, ours) in requests]
    assert sum(changed) > len(requests) / 2, "control changes too little here to be told from none"


def test_requests_of_different_lengths_come_and_go_and_each_says_what_it_says_alone(start, monkeypatch):
    """More requests than rows, in chunks of the prompt, with preemption: rows move all the time."""
    few = {"enable_prefix_caching": False, "block_size": 32, "num_gpu_blocks_override": 9}
    engine = start(max_num_seqs=6, max_num_batched_tokens=16, **few)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    preempted, own = [], scheduler._preempt_request

    def preempt(*args, **kwargs):
        preempted.append(args)
        return own(*args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    drawn = random.Random(2)
    requests = [(prompt, *drawn.choice(ASKED), drawn.randrange(1, 60)) for prompt in prompts(48, seed=3)]
    together = answers(engine, [r[0] for r in requests], [greedy(r[3], extra_args=r[1]) for r in requests])
    assert preempted
    for (prompt, extra, _, tokens), said in zip(requests, together, strict=True):
        assert said == answers(engine, [prompt], greedy(tokens, extra_args=extra))[0], extra


def test_the_base_is_vllm_s_own_bit_for_bit(served, start):
    engine = start(max_logprobs=97)
    params = greedy(4, logprobs=97, extra_args={"control": False})
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(4)]
    ours = [output.outputs[0].logprobs for output in engine.generate(asked, params, use_tqdm=False)]
    settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 32, "enforce_eager": True}
    plain = vllm.LLM(served.base, max_logprobs=97, **settings)
    theirs = plain.generate(asked, greedy(4, logprobs=97), use_tqdm=False)
    for one, other in zip(ours, theirs, strict=True):
        other = other.outputs[0].logprobs
        assert [{i: p.logprob for i, p in step.items()} for step in one] == [
            {i: p.logprob for i, p in step.items()} for step in other
        ]


def test_several_answers_to_one_prompt_are_each_controlled(engine, says):
    (prompt,) = prompts(1)
    (output,) = engine.generate(
        [{"prompt_token_ids": prompt}],
        vllm.SamplingParams(n=3, temperature=1e-6, max_tokens=8, ignore_eos=True, seed=0),
        use_tqdm=False,
    )
    assert [list(answer.token_ids) for answer in output.outputs] == 3 * [says(prompt)]


def test_beams_follow_the_heads_own_control(engine, wrapped):
    (prompt,) = prompts(1)
    params = vllm.sampling_params.BeamSearchParams(beam_width=1, max_tokens=6, ignore_eos=True)
    (output,) = engine.beam_search([{"prompt_token_ids": prompt}], params)
    ids = torch.tensor([prompt])
    ours = wrapped.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    assert output.sequences[0].tokens == ours[0].tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_a_shared_prefix_in_the_cache_changes_nothing(start, says, cached):
    engine = start(enable_prefix_caching=cached, block_size=32)
    shared = (prompts(1)[0] * 40)[:70]
    asked = [(extra, ours) for extra, ours in ASKED if "target" not in str(extra)]
    requests = [[*shared, *prompt] for prompt in prompts(len(asked), seed=4)]
    for _ in range(2):
        given = answers(engine, requests, [greedy(extra_args=extra) for extra, _ in asked])
        assert given == [says(prompt, **ours) for prompt, (_, ours) in zip(requests, asked, strict=True)]


BAD = [
    ({"control": {"stepsize": 1}}, "stepsize"),
    ({"control": {"step_size": -1}}, "step_size"),
    ({"control": {"step_size": float("nan")}}, "finite"),
    ({"control": "ascent"}, "`control` must be an object"),
    ({"control": 3}, "`control` must be an object"),
    ({"value_heads": {"rude": 1}}, "rude"),
    ({"value_heads": "polite"}, "`value_heads` must be an object"),
    ({"recontrol_model": "tiny:rude"}, "tiny:polite"),
    ({"control": {"target": 1.0}, "value_heads": {"default": 1, "polite": 1}}, "values of one head"),
    ({"control": {"target": [1.0, 2.0]}}, "2 values"),
    ({"control": {"method": "advantage"}}, "step size"),
]


@pytest.mark.parametrize(("extra", "words"), BAD)
def test_a_bad_request_is_refused_in_our_words_and_the_others_go_on(engine, says, extra, words):
    good = prompts(2)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=words):
        answers(engine, [good[0], good[1]], [greedy(), greedy(extra_args=extra)])
    assert answers(engine, good, greedy()) == [says(prompt) for prompt in good]


def test_log_probabilities_of_a_prompt_are_the_base_s_alone(engine, says):
    first, second, third = prompts(3)
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="`control` false"):
        answers(engine, [first], greedy(prompt_logprobs=1))
    mixed = [greedy(prompt_logprobs=2, extra_args={"control": False}), greedy(), greedy(extra_args=ASKED[10][0])]
    assert answers(engine, [first, second, third], mixed) == [
        says(first, control=False),
        says(second),
        says(third, **ASKED[10][1]),
    ]


def test_steps_too_long_stay_in_range_and_harm_nobody(engine, says):
    """vLLM cannot fail one request from inside a step: what leaves the range is clamped to it."""
    good = prompts(2)
    wild = greedy(extra_args={"control": {"step_size": 1e38}})
    runaway = greedy(extra_args={"control": {"step_size": 1e30, "num_steps": 50, "target": 3.0}})
    given = answers(engine, [good[0], good[0], good[0], good[1]], [greedy(), wild, runaway, greedy()])
    assert [given[0], given[3]] == [says(prompt) for prompt in good]
    assert all(0 <= token < 97 for tokens in given for token in tokens)


def test_an_aborted_request_leaves_the_others_alone(engine, says):
    llm_engine = engine.llm_engine
    requests = prompts(6, seed=5)
    for number, prompt in enumerate(requests):
        llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy(extra_args=ASKED[number][0]))
    done, step = {}, 0
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.finished:
                done[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
        step += 1
        if step == 3:
            llm_engine.abort_request(["0", "3"])
    assert {number: done.get(number) for number in "1245"} == {
        number: says(requests[int(number)], **ASKED[int(number)][1]) for number in "1245"
    }


def test_another_control_of_the_first_head_is_the_engine_s(start, says):
    own = ControlConfig(step_size=0.2, num_steps=4)
    engine = start(control=own)
    requests = prompts(4)
    assert answers(engine, requests, greedy()) == [says(prompt, control=own) for prompt in requests]
    assert answers(engine, requests, greedy(extra_args={"control": {"num_steps": 10, "step_size": 1.0}})) == [
        says(prompt, control=ASCENT) for prompt in requests
    ]
