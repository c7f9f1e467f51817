"""Prompts to responses."""

import json

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.rollouts import (
    Rollout,
    _cut,
    encode_prompt,
    generate_rollouts,
    load_prompts,
    load_rollouts,
    pad_batch,
    save_rollouts,
)

from .conftest import make_head
from .tiny_models import tiny_model
from .tiny_tokenizer import byte_tokenizer, tiny_tokenizer

PROMPTS = ["w5 w6 w7", "w8", "w9 w10"]


@pytest.fixture
def model():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_prompt_order_and_samples_of_one_prompt_follow_each_other(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, PROMPTS, num_samples=3, max_new_tokens=6, batch_size=2)
    assert [r.prompt for r in rollouts] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(r.completion_ids) for r in rollouts}) > 3, "samples of one prompt differ"


def test_the_same_seed_gives_the_same_rollouts_and_leaves_the_global_generator_alone(model, tokenizer):
    before = torch.get_rng_state()
    first = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=3)
    assert first != generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=4)


def test_greedy_rollouts_of_a_batch_are_those_of_single_prompts(model, tokenizer):
    together = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    alone = [generate_rollouts(model, tokenizer, [p], max_new_tokens=8, temperature=0.0)[0] for p in PROMPTS]
    assert together == alone


def test_a_response_ends_with_the_token_that_ended_it_and_its_text_without(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, PROMPTS, num_samples=40, max_new_tokens=12, temperature=2.0)
    finished = [r for r in rollouts if r.finished]
    assert finished and len(finished) < len(rollouts)
    for rollout in rollouts:
        assert rollout.finished == (2 in rollout.completion_ids)
        assert 2 not in rollout.completion_ids[:-1]
        words = rollout.completion_ids[:-1] if rollout.finished else rollout.completion_ids
        assert rollout.completion == tokenizer.decode(words, skip_special_tokens=True)
        assert rollout.finished or len(rollout.completion_ids) == 12


def test_a_stop_string_ends_the_turn_and_is_cut_from_text_and_tokens():
    model, tokenizer = tiny_model("llama", dtype=torch.float32, vocab_size=258), byte_tokenizer()
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}
    plain = generate_rollouts(model, tokenizer, ["abc"], **options)[0]
    # Three bytes from the middle, so that the stop string is several tokens long.
    stop = tokenizer.decode(plain.completion_ids[5:8])
    assert "\ufffd" not in stop
    cut = generate_rollouts(model, tokenizer, ["abc"], stop_strings=[stop, "never"], **options)[0]
    assert cut.finished and not plain.finished
    assert cut.completion == plain.completion[: plain.completion.index(stop)]
    # The tokens of the stop string are what ended the turn, and what was drawn behind them is not kept.
    assert cut.completion_ids == plain.completion_ids[:8]


def test_odd_defaults_of_the_base_do_not_bend_its_rollouts(model, tokenizer):
    plain = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8)
    odd = {"repetition_penalty": 1.9, "top_k": 2, "no_repeat_ngram_size": 1, "num_beams": 3, "typical_p": 0.5}
    odd |= {
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "stop_strings": ["w9"],
        "forced_eos_token_id": 9,
    }
    model.generation_config.update(**odd)
    assert generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8) == plain


def test_a_stop_string_that_is_a_special_token_or_follows_split_characters():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    letters = tokenizer("ab")["input_ids"]
    assert _cut(tokenizer, [*letters, stop, 0, 0], [1], ["<stop>"]) == ("ab", [*letters, stop], True)
    ids = tokenizer("\U0001f44d!\n\nHuman: x")["input_ids"]
    assert _cut(tokenizer, ids, [1], ["\n\nHuman:"]) == ("\U0001f44d!", ids[: 4 + 1 + 8], True)


def test_a_prompt_too_long_for_the_model_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="make 70 tokens, the model has room for 64"):
        generate_rollouts(model, tokenizer, ["w5 " * 10], max_new_tokens=60)


def test_rollouts_come_from_the_base_unless_control_is_asked_for(model, tokenizer):
    base = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    control = ControlConfig(step_size=5.0, num_steps=10)
    controlled = ReControlForCausalLM.from_model(model, make_head(hidden_size=16), control)
    assert generate_rollouts(controlled, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0) == base
    assert (
        generate_rollouts(controlled, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0, control=control) != base
    )


def test_a_chat_template_is_applied_once_to_texts_and_messages():
    tokenizer = tiny_tokenizer(chat=True)
    messages = [{"role": "user", "content": "w5 w6"}]
    ids = encode_prompt(tokenizer, messages)
    assert ids == encode_prompt(tokenizer, "w5 w6")
    assert tokenizer.decode(ids).replace(" ", "") == "userw5w6<end>assistant"
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(tiny_tokenizer(), messages)


def test_no_prompts_and_a_prompt_without_tokens_are_errors(model, tokenizer):
    with pytest.raises(ValueError, match="No prompts"):
        generate_rollouts(model, tokenizer, [])
    with pytest.raises(ValueError, match="no tokens"):
        generate_rollouts(model, tokenizer, ["w5", ""])


def test_padding_sides():
    left = pad_batch([[1, 2], [3]], 9, "left", "cpu")
    right = pad_batch([[1, 2], [3]], 9, "right", "cpu")
    assert left["input_ids"].tolist() == [[1, 2], [9, 3]] and left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert right["input_ids"].tolist() == [[1, 2], [3, 9]] and right["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_files_round_trip(tmp_path):
    rollouts = [
        Rollout("é w5", "ü\n", [5], [6, 2], True, [0.5, -1.0], {"topic": "x"}),
        Rollout([{"role": "user", "content": "w5"}], "", [5], [], False),
    ]
    save_rollouts(rollouts, tmp_path / "deeper" / "rollouts.jsonl")
    assert load_rollouts(tmp_path / "deeper" / "rollouts.jsonl") == rollouts


def test_columns_of_a_prompt_are_kept(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, [{"prompt": "w5", "topic": "a"}], max_new_tokens=2)
    assert rollouts[0].columns == {"topic": "a"}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2"),
        (b'{"prompt": "a"}\nnot json\n', "line 2"),
        (b'{"prompt": ""}\n', "line 1"),
        (b'["a"]\n', "line 1"),
        (b'{"prompt": [{"role": "user"}]}\n', "line 1"),
        (b"\n\n", "no rows"),
        (b'{"prompt": "\xff"}\n', "UTF-8"),
    ],
)
def test_bad_prompt_files_are_named_with_their_line(tmp_path, content, error):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=error) as raised:
        load_prompts(path)
    assert str(path) in str(raised.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(OSError, match=r"absent\.jsonl"):
        load_prompts(tmp_path / "absent.jsonl")


def test_a_file_that_holds_no_rollouts_says_how_to_make_some(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ValueError, match="recontrol rollout"):
        load_rollouts(path)
