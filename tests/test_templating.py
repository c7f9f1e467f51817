"""Prompts to token ids: the chat template, special tokens in a prompt's own text, and what the template is given."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from hf_recontrol import ReControlForCausalLM, encode_prompt, load_rollouts
from hf_recontrol.cli import app
from hf_recontrol.collection.rollouts import generate_rollouts, write_rollouts
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.templating import prompt_text

from .conftest import make_head
from .tiny_models import tiny_model
from .tiny_tokenizer import byte_tokenizer, chatml_tokenizer, tiny_tokenizer

START, END = 258, 259
MENTION = "What does <|im_end|> mean?"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}


@pytest.fixture
def chatml():
    return chatml_tokenizer()


def user(text):
    return [{"role": "user", "content": text}]


def templated(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)[
        "input_ids"
    ]


def test_a_text_is_the_users_message(chatml):
    assert encode_prompt(chatml, "Hi") == encode_prompt(chatml, user("Hi")) == templated(chatml, user("Hi"))


def test_a_question_about_a_special_token_is_templated_and_the_token_is_text(chatml, recontrol_warnings):
    """See gemma#768."""
    plain = chatml("What does ")["input_ids"], chatml(" mean?")["input_ids"]
    spelled = [chatml.convert_tokens_to_ids(letter) for letter in "<|im_end|>"]
    around = templated(chatml, user("@"))
    at = around.index(chatml.convert_tokens_to_ids("@"))
    expected = [*around[:at], *plain[0], *spelled, *plain[1], *around[at + 1 :]]
    assert encode_prompt(chatml, MENTION) == expected == encode_prompt(chatml, user(MENTION))
    assert len(recontrol_warnings) == 2 and "'<|im_end|>'" in recontrol_warnings[0]
    assert "--prompt-format formatted" in recontrol_warnings[0]
    assert encode_prompt(chatml, MENTION, prompt_format="plain") == expected


@pytest.mark.parametrize(
    "text", ["<|im_start|> is what?", "<|im_start|>user\nHi", "Is <|im_start|>user\nHi<|im_end|> ok?"]
)
def test_what_only_begins_like_a_formatted_prompt_is_none(chatml, text, recontrol_warnings):
    ids = encode_prompt(chatml, text)
    assert chatml.decode(ids) == chatml.decode(templated(chatml, user("@"))).replace("@", text)
    assert ids.count(START) == 3 and ids.count(END) == 2, "the template's own alone"
    assert "are mentioned" in recontrol_warnings[0]


FORMATTED = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nSure,",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nOh<|im_end|>\n"
    "<|im_start|>assistant\n",
]


@pytest.mark.parametrize("text", FORMATTED)
def test_a_formatted_text_is_taken_as_it_is(chatml, text):
    expected = chatml(text, add_special_tokens=False)["input_ids"]
    assert encode_prompt(chatml, text) == expected == encode_prompt(chatml, text, prompt_format="formatted")


def test_what_the_template_makes_is_recognised_with_any_arguments(chatml, recontrol_warnings):
    for options in ({}, {"enable_thinking": False}):
        for messages in (user("Hi"), [{"role": "system", "content": "Be brief."}, *user("Hi")]):
            ids = templated(chatml, messages, **options)
            assert encode_prompt(chatml, chatml.decode(ids)) == ids
            assert not recontrol_warnings
            assert encode_prompt(chatml, chatml.decode(ids), chat_template_kwargs={"enable_thinking": False}) == ids
            assert "'chat_template_kwargs' reaches no chat template" in recontrol_warnings.pop()


def test_the_format_can_be_said(chatml):
    half = "Once <|im_end|> upon"
    assert encode_prompt(chatml, half, prompt_format="formatted") == chatml(half)["input_ids"]
    ids = encode_prompt(chatml, user(half), prompt_format="formatted")
    assert ids == templated(chatml, user(half)) and ids.count(END) == 3
    with pytest.raises(ValueError, match="prompt_format"):
        encode_prompt(chatml, "a", prompt_format="chat")


def test_a_formatted_text_begins_with_bos_once(recontrol_warnings):
    tokenizer = chatml_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = templated(tokenizer, user("Hi"))
    text = tokenizer.decode(ids)
    assert ids[0] == tokenizer.bos_token_id and text.startswith("<bos>")
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, text.removeprefix("<bos>")) == ids
    # In a template that marks turns in plain words BOS alone opens no formatted prompt.
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
    ids = templated(tokenizer, user("Hi"))
    assert encode_prompt(tokenizer, "<bos>[INST] Hi [/INST]") == encode_prompt(tokenizer, "[INST] Hi [/INST]") == ids
    assert encode_prompt(tokenizer, "<bos> is what?").count(tokenizer.bos_token_id) == 1
    assert len(recontrol_warnings) == 1


def test_without_a_template_a_text_is_tokenized_as_the_tokenizer_does(recontrol_warnings):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "ab") == encode_prompt(tokenizer, "<bos>ab") == [bos, *letters]
    assert not recontrol_warnings
    assert encode_prompt(tokenizer, "ab<end>ab") == [bos, *letters, end, *letters]
    assert "'<end>' act as such" in recontrol_warnings[0]
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<end>"]
    assert encode_prompt(tokenizer, "ab<end>", prompt_format="plain") == [bos, *letters, *spelled]


def test_where_a_token_cannot_be_made_harmless_an_error_says_so(chatml, monkeypatch):
    # A word of the vocabulary itself.
    with pytest.raises(ValueError, match="'<end>'"):
        encode_prompt(tiny_tokenizer(chat=True), "what is <end> here")
    with pytest.raises(ValueError, match="cannot take '<end>' as ordinary text"):
        encode_prompt(tiny_tokenizer(), "what is <end> here", prompt_format="plain")
    # A release of transformers without `sanitize_control_tokens`.
    older = lambda messages, add_generation_prompt, tokenize=True, return_dict=False, **kwargs: None  # noqa: E731
    monkeypatch.setattr(chatml, "apply_chat_template", older)
    with pytest.raises(ValueError, match=r"mentions the special token '<\|im_end\|>'.*--prompt-format formatted"):
        encode_prompt(chatml, MENTION)


def test_arguments_for_all_rows_and_of_a_row_reach_the_template(chatml):
    off, on = templated(chatml, user("Hi"), enable_thinking=False), templated(chatml, user("Hi"))
    assert off != on
    assert encode_prompt(chatml, "Hi", chat_template_kwargs={"enable_thinking": False}) == off
    row = {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": False}}
    assert encode_prompt(chatml, row) == off
    assert encode_prompt(chatml, row | {"chat_template_kwargs": '{"enable_thinking": false}'}) == off, "as JSON"
    assert encode_prompt(chatml, row | {"chat_template_kwargs": None}) == on
    assert encode_prompt(chatml, row, chat_template_kwargs={"enable_thinking": True}) == off, "the row's come first"


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_reach_the_template(chatml, tools):
    ids = encode_prompt(chatml, {"prompt": "Hi", "tools": tools})
    assert ids == templated(chatml, user("Hi"), tools=[TOOL]) != encode_prompt(chatml, "Hi")
    assert encode_prompt(chatml, {"prompt": "Hi", "tools": []}) == encode_prompt(chatml, "Hi")


def test_what_a_template_cannot_use_is_named(chatml, recontrol_warnings):
    with pytest.raises(ValueError, match="knows no 'enable_thinkin'"):
        encode_prompt(chatml, "Hi", chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match="may not hold 'add_generation_prompt'"):
        encode_prompt(chatml, "Hi", chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(ValueError, match=r"'tools'.*beside the messages"):
        encode_prompt(chatml, "Hi", chat_template_kwargs={"tools": [TOOL]})
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(byte_tokenizer(), "Hi", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(TypeError, match="what JSON can hold"):
        encode_prompt(chatml, "Hi", chat_template_kwargs={"enable_thinking": object()})
    with pytest.raises(ValueError, match="'tools' holds 'hammer, saw', expected a list of tools"):
        encode_prompt(chatml, {"prompt": "Hi", "tools": "hammer, saw"})
    with pytest.raises(ValueError, match="'chat_template_kwargs' holds 3"):
        encode_prompt(chatml, {"prompt": "Hi", "chat_template_kwargs": 3})
    assert not recontrol_warnings
    assert encode_prompt(chatml, {"prompt": "Hi", "chat_template_kwargs": {"mood": 1}}) == encode_prompt(chatml, "Hi")
    assert "given 'mood', which it does not know" in recontrol_warnings.pop()
    encode_prompt(byte_tokenizer(), {"prompt": "Hi", "tools": [TOOL]})
    assert "'tools' reaches no chat template" in recontrol_warnings.pop()
    chatml.chat_template = "{{ messages[0]['content'] }}"
    encode_prompt(chatml, {"prompt": "Hi", "tools": [TOOL]})
    assert "given 'tools', which it does not know" in recontrol_warnings.pop()


def test_messages_reach_the_template_with_all_that_they_hold(chatml):
    messages = [
        *user([{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}]),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"name": "weather", "arguments": {"days": 2, "all": True}}],
        },
        {"role": "tool", "content": "21", "tool_call_id": "a"},
    ]
    text = chatml.decode(encode_prompt(chatml, messages))
    assert (
        "user\nIs it warm?<|im_end|>" in text and '{"name": "weather", "arguments": {"days": 2, "all": true}}' in text
    )
    assert "None" not in text


def test_a_template_that_knows_parts_alone_gets_the_text(chatml):
    """As those of Idefics, SmolVLM and LLaVA-NeXT: they write nothing for a text."""
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% for part in m['content'] if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant:"
    )
    text = "<|im_start|>user: Hi<|im_end|><|im_start|>assistant:"
    ids = chatml(text)["input_ids"]
    assert encode_prompt(chatml, "Hi") == encode_prompt(chatml, user("Hi")) == encode_prompt(chatml, text) == ids
    assert encode_prompt(chatml, user([{"type": "text", "text": "Hi"}])) == ids


TRL = find_spec("trl")
REAL = sorted(Path(TRL.origin).parent.glob("chat_templates/*.jinja")) if TRL else []


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_templates_of_real_models(path, recontrol_warnings):
    tokenizer = byte_tokenizer()
    written = path.read_text(encoding="utf-8")
    marks = sorted(set(re.findall(r"<[|｜][\w▁]+[|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>", written)))
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": marks})
    tokenizer.chat_template = written
    ids = encode_prompt(tokenizer, "Hi there")
    text = tokenizer.decode(ids)
    assert text.count("Hi there") == 1
    assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, text.removeprefix("<bos>")) == ids, "formatted"
    assert not recontrol_warnings
    for mark in ["<bos>", *marks]:
        number = tokenizer.convert_tokens_to_ids(mark)
        for question in (f"What is {mark}?", f"{mark} is what?"):
            asked = encode_prompt(tokenizer, question)
            assert asked.count(number) == ids.count(number) and text.replace("Hi there", question) == tokenizer.decode(
                asked
            )


def test_a_template_that_writes_nothing_around_a_text_gets_texts(chatml):
    chatml.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert chatml.decode(encode_prompt(chatml, user("Hi there"))) == "Hi there"
    assert chatml.decode(encode_prompt(chatml, "Hi there")) == "Hi there"


def test_a_template_that_prints_parts_or_drops_messages_does_not_go_unnoticed(chatml, recontrol_warnings):
    parts = user([{"type": "text", "text": "Hi"}])
    with pytest.raises(ValueError, match="takes contents as texts, not in parts"):
        encode_prompt(tiny_tokenizer(chat=True), parts)
    chatml.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    encode_prompt(chatml, [{"role": "system", "content": "Be brief."}, *user("Hi")])
    assert (
        len(recontrol_warnings) == 1
        and "leaves out or changes a message, such as one of the role 'system'" in recontrol_warnings[0]
    )
    # Messages that the template puts in another order are all there; one that it cuts is not.
    chatml.chat_template = "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"
    many = [user(f"question {i}")[0] for i in range(300)]
    for asked in (many[:20], [*many[:20], *many[:20]], many):
        encode_prompt(chatml, asked)
    assert len(recontrol_warnings) == 1
    chatml.chat_template = "{% for m in messages %}{{ m['content'][:60] }}{% endfor %}"
    encode_prompt(chatml, user("Hello " * 20))
    assert len(recontrol_warnings) == 2
    chatml.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="does not take the prompt: roles must alternate"):
        encode_prompt(chatml, "Hi")
    chatml.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ValueError, match="does not take the prompt"):
        encode_prompt(chatml, "Hi")


def test_an_end_token_behind_the_prompt_is_warned_of(recontrol_warnings):
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    assert encode_prompt(tokenizer, "ab")[-1] == end
    assert "In 1 prompt the end token '<end>' stands last" in recontrol_warnings[0]


@pytest.fixture
def model():
    return tiny_model("llama", dtype=torch.float32, vocab_size=260)


def test_tokens_that_the_model_has_no_embedding_of_are_named_before_any_forward(chatml, monkeypatch):
    """See transformers#23401: a token was added to the tokenizer, and the model was not resized."""
    small = tiny_model("llama", dtype=torch.float32, vocab_size=258)
    monkeypatch.setattr(small, "generate", None)
    with pytest.raises(ValueError, match=r"row 0: the token '<\|im_end\|>' has the id 259, .* for 258 tokens"):
        generate_rollouts(small, chatml, ["Hi"], max_new_tokens=2)
    chatml.chat_template = None
    chatml.eos_token = "<|im_end|>"
    small.generation_config.eos_token_id = None
    with pytest.raises(
        ValueError, match=r"`eos_token_id` is 259 \('<\|im_end\|>'\), the model has embeddings for 258"
    ):
        generate_rollouts(small, chatml, ["Hi"], max_new_tokens=2)


def test_a_padding_token_that_the_model_lacks_is_not_used():
    model, tokenizer = tiny_model("llama", dtype=torch.float32, vocab_size=258), byte_tokenizer()
    expected = generate_rollouts(model, tokenizer, ["ab", "c"], max_new_tokens=4)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    assert tokenizer.pad_token_id == 258
    assert generate_rollouts(model, tokenizer, ["ab", "c"], max_new_tokens=4) == expected


def test_every_row_is_templated_by_one_rule_and_a_run_with_another_is_refused(
    tmp_path, model, chatml, recontrol_warnings
):
    rows = load_prompts([{"prompt": "Hi", "tools": [TOOL]}, {"prompt": MENTION}])
    options = {"max_new_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}}
    model.config.max_position_embeddings = 512
    found = generate_rollouts(model, chatml, rows, **options)
    settings = {"chat_template_kwargs": options["chat_template_kwargs"]}
    assert [r.prompt_ids for r in found] == [encode_prompt(chatml, row, **settings) for row in rows.rows]
    assert [r.columns for r in found] == [{"tools": [TOOL]}, {"tools": None}]
    assert sum("are mentioned" in warning for warning in recontrol_warnings) == 2
    with pytest.raises(ValueError, match="knows no 'thinking_enabled'"):
        write_rollouts(tmp_path / "run", model, chatml, rows, chat_template_kwargs={"thinking_enabled": False})
    write_rollouts(tmp_path / "run", model, chatml, rows, **options)
    with pytest.raises(ValueError, match=r"chat_template_kwargs\.enable_thinking was False, is None"):
        write_rollouts(tmp_path / "run", model, chatml, rows, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt_format was 'auto', is 'formatted'"):
        write_rollouts(tmp_path / "run", model, chatml, rows, **options, prompt_format="formatted")
    other = load_prompts([{"prompt": "Hi"}, {"prompt": MENTION}])
    with pytest.raises(ValueError, match="prompts was"):
        write_rollouts(tmp_path / "run", model, chatml, other, **options)


def test_the_commands_hand_arguments_on(tmp_path, model, chatml):
    base = tmp_path / "base"
    model.save_pretrained(base)
    chatml.save_pretrained(base)
    ReControlForCausalLM.from_model(model, make_head(hidden_size=16)).save_pretrained(tmp_path / "head")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"}\n')
    run = CliRunner()
    command = ["rollout", "-m", str(base), "--prompts", str(tmp_path / "p.jsonl"), "-o", str(tmp_path / "run")]
    command += ["--max-new-tokens", "2", "--chat-template-kwargs"]
    assert run.invoke(app, [*command, '{"enable_thinking": false}'], catch_exceptions=False).exit_code == 0
    (rollout,) = load_rollouts(tmp_path / "run")
    assert rollout.prompt_ids == templated(chatml, user("Hi"), enable_thinking=False)
    generate = ["generate", str(tmp_path / "head"), "Hi", "-m", str(base), "--max-new-tokens", "2", "--step-size", "1"]
    assert run.invoke(app, [*generate, "--prompt-format", "plain"], catch_exceptions=False).exit_code == 0
    refused = run.invoke(app, [*generate, "--chat-template-kwargs", '{"thinking": false}'])
    assert "knows no 'thinking'" in str(refused.exception)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("w1", "w1"),
        ([{"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "w2"}]}], "w1\nw2"),
        ([{"role": "user", "content": [{"type": "image", "text": None}, {"text": "w1"}]}], "(image)\nw1"),
        ([{"role": "user", "content": "w1"}, {"role": "assistant", "content": None, "tool_calls": [1]}], "w1"),
        ([{"role": "system", "content": ""}, {"role": "user", "content": "w1"}, {"role": "tool"}], "w1"),
        ([{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}], "w1\n\nw2"),
    ],
)
def test_a_chat_as_one_text(prompt, text):
    assert prompt_text(prompt) == text
