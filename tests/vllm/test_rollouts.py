"""Rollouts drawn by vLLM, started here or behind its server: the rows, seeds and files of our own sampler."""

from multiprocessing import active_children

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, recontrol_engine_args
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts

from ..conftest import make_llama

pytest.importorskip("vllm")
pytest.importorskip("pyarrow")

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 17)]
SETTINGS = {"max_new_tokens": 12, "part_size": 5, "prompt_format": "plain"}
EAGER = {"enforce_eager": True, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def tokenizer(served):
    return AutoTokenizer.from_pretrained(served.base)


@pytest.fixture(scope="module")
def base(served):
    return AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)


def write(folder, model, tokenizer, arguments=EAGER, engine="vllm", prompts=PROMPTS, **changes):
    other = {} if engine is None else {"engine": engine, "engine_arguments": arguments}
    quiet = {"progress": lambda *_: None}
    write_rollouts(folder, model, tokenizer, load_prompts(prompts), **(SETTINGS | other | quiet | changes))
    return load_rollouts(folder)


@pytest.mark.parametrize("stop_strings", [(), ("w7",)])
def test_greedy_rollouts_are_those_of_our_own_sampler(tmp_path, base, tokenizer, stop_strings):
    options = {"temperature": 0.0, "stop_strings": stop_strings}
    ours = write(tmp_path / "ours", base, tokenizer, engine=None, **options)
    assert write(tmp_path / "theirs", base, tokenizer, **options) == ours
    assert not stop_strings or any(rollout.finished for rollout in ours)


def test_nothing_that_vllm_deprecates_is_used(tmp_path, base, tokenizer, caplog):
    write(tmp_path, base, tokenizer)
    assert "deprecated" not in caplog.text


def test_a_response_depends_on_its_own_seed_and_a_stopped_run_goes_on(tmp_path, base, tokenizer):
    options = {"num_samples": 3, "temperature": 1.0}
    first = write(tmp_path / "a", base, tokenizer, **options)
    assert len({tuple(rollout.completion_ids) for rollout in first}) > 30
    for part in sorted((tmp_path / "a").glob("part-*"))[1::2]:
        part.unlink()
    assert write(tmp_path / "a", base, tokenizer, EAGER | {"max_num_seqs": 2}, **options) == first
    assert write(tmp_path / "b", base, tokenizer, **options, seed=1) != first


def test_prompts_of_which_not_all_fit_into_one_batch(tmp_path, base, tokenizer):
    """One that is read in pieces, and whose response has a seed, ends vLLM on a CPU."""
    long = [" ".join(f"w{i + j}" for j in range(40)) for i in range(5, 11)]
    options = {"prompts": long, "temperature": 1.0}
    drawn = write(tmp_path / "a", base, tokenizer, EAGER | {"max_num_batched_tokens": 64}, **options)
    assert drawn == write(tmp_path / "b", base, tokenizer, EAGER | {"max_num_batched_tokens": 512}, **options)


def test_the_draws_are_those_of_the_model(tmp_path, base, tokenizer):
    options = {"num_samples": 200, "temperature": 1.0, "max_new_tokens": 1, "part_size": 2400}
    drawn = write(tmp_path, base, tokenizer, EAGER | {"max_num_seqs": 64}, **options)
    # G against the model's own distribution; each prompt's has some 96 degrees of freedom, of which few are likely.
    gains = []
    for prompt in PROMPTS:
        of_prompt = [rollout for rollout in drawn if rollout.prompt == prompt]
        with torch.no_grad():
            p = base(torch.tensor([of_prompt[0].prompt_ids])).logits[0, -1].softmax(-1)
        likely = p.topk(5).indices.tolist()
        share = sum(rollout.completion_ids[0] in likely for rollout in of_prompt) / len(of_prompt)
        expected = float(p[likely].sum())
        gains.append((share - expected) / (expected * (1 - expected) / len(of_prompt)) ** 0.5)
    assert max(map(abs, gains)) < 4
    assert abs(sum(gains)) / len(gains) ** 0.5 < 4


def test_rollouts_are_drawn_under_the_control_of_heads(tmp_path, served, base, tokenizer):
    model = ReControlForCausalLM.from_pretrained(served.base, value_head=served.heads["default"], dtype=torch.float32)
    model.add_value_head("polite", ValueHead.from_pretrained(served.heads["polite"]))
    arguments = recontrol_engine_args(served.base, served.heads) | EAGER
    control = ControlConfig(method="advantage", step_size=2.0)
    with model.use_control(None, {"default": 0.5, "polite": 1.0}):
        ours = write(tmp_path / "ours", model, tokenizer, engine=None, control=control, temperature=0.0)
        theirs = write(tmp_path / "theirs", model, tokenizer, arguments, control=control, temperature=0.0)
    assert theirs == ours
    plain = write(tmp_path / "plain", model, tokenizer, arguments, temperature=0.0)
    assert [r.completion_ids for r in plain] != [r.completion_ids for r in ours]
    assert plain == write(tmp_path / "base", base, tokenizer, engine=None, temperature=0.0)
    with pytest.raises(ValueError, match=r"need an engine with the heads"):
        write(tmp_path / "none", model, tokenizer, control=control)


def test_what_was_drawn_before_the_engine_was_killed_is_kept(tmp_path, base, tokenizer, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")

    def kill(done, total):
        if done >= 5:
            for child in active_children():
                child.kill()

    with pytest.raises(OSError, match=r"vLLM stopped, .* goes on from there"):
        write(tmp_path, base, tokenizer, num_samples=4, progress=kill)
    assert list(tmp_path.glob("part-*"))


def test_an_end_that_the_model_cannot_draw_is_not_asked_for(tmp_path, base, tokenizer, monkeypatch):
    monkeypatch.setattr(base.generation_config, "eos_token_id", [2, 50256])
    ours = write(tmp_path / "ours", base, tokenizer, engine=None, temperature=0.0)
    assert write(tmp_path / "theirs", base, tokenizer, temperature=0.0) == ours


def test_another_model_or_head_is_refused(tmp_path, served, base, tokenizer):
    other = make_llama(seed=5, vocab_size=97, hidden_size=64, max_position_embeddings=256)
    other.config._name_or_path = served.base
    with pytest.raises(ValueError, match="holds another model"):
        write(tmp_path / "1", other, tokenizer)
    model = ReControlForCausalLM.from_pretrained(served.base, value_head=served.heads["default"], dtype=torch.float32)
    arguments = recontrol_engine_args(served.base, {"default": served.heads["polite"]}) | EAGER
    with pytest.raises(ValueError, match=r"holds another model than .* under this control"):
        write(tmp_path / "2", model, tokenizer, arguments, control=model.control)
    assert not list(tmp_path.rglob("part-*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "x"}, "must not hold 'model'"),
        ({"seed": 3}, "must not hold 'seed'"),
        ({"tensor_paralel_size": 2}, "vLLM knows no 'tensor_paralel_size'"),
    ],
)
def test_arguments_that_it_does_not_take_say_so(tmp_path, base, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, base, tokenizer, arguments)
