"""`recontrol chat`: real conversations with the command, line by line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

COMMAND = str(Path(sys.executable).with_name("recontrol"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with a chat template and without, and a head of it."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    for name in ("base", "plain"):
        model.save_pretrained(folder / name)
        tiny_tokenizer(chat=name == "base").save_pretrained(folder / name)
    head = tiny_head(model, "lm_head", control=ControlConfig("advantage", 3.0))
    head.config.base_model_name_or_path = str(folder / "base")
    head.save_pretrained(folder / "head")
    return folder


def chat(folder, *lines, words=(), code=0):
    done = subprocess.run(
        [COMMAND, "chat", folder / "head", "--max-new-tokens", "6", *words],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def expected(folder, prompts, control, name="base"):
    """Greedy answers to a conversation, remembered as they come."""
    tokenizer = tiny_tokenizer(chat=name == "base")
    base = ReControlForCausalLM.from_pretrained(folder / "base", value_head=folder / "head", dtype=torch.float32)
    messages, answers = [], []
    for prompt in prompts:
        messages.append({"role": "user", "content": prompt})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        tokens = base.generate(ids, max_new_tokens=6, do_sample=False, control=control, pad_token_id=0)
        answers.append(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_conversation_under_control_and_its_commands(folder):
    said = ("w5 w6", "w7 w8")
    page = folder / "last.html"
    (folder / "mine.json").write_text("{}")
    lines = ("/trace", *said, f"/trace '{folder / 'mine.json'}'", "/history", f"/trace '{page}'", "/exit")
    output = chat(folder, *lines, words=["--temperature", "0", "--mode", "on"])
    answers = expected(folder, said, None)
    assert "is no trace" in output and (folder / "mine.json").read_text() == "{}"
    assert "nothing was said yet" in output and json.loads(page.with_suffix(".json").read_text())
    assert all(word in page.read_text() for word in answers[1].split())
    history = [line for line in output.replace("> ", "\n").splitlines() if line.startswith(("user: ", "assistant: "))]
    assert history == [
        f"user: {said[0]}",
        f"assistant: {answers[0]}",
        f"user: {said[1]}",
        f"assistant: {answers[1]}",
    ]
    assert answers != expected(folder, said, False)


def test_both_answers_strengths_heads_and_what_is_wrong(folder):
    lines = ["w5 w6", "/strength 0", "/clear", "w5 w6", "/strength much", "/strength 1e38", "w5", "/strength 3"]
    lines += ["/off", "/clear", "w5 w6", "/heads", "/heads nobody=1", "/heads other=0.5", "/nonsense"]
    output = chat(folder, *lines, words=["--temperature", "0", "--value-head", f"other={folder / 'head'}"])
    [base], [controlled] = (expected(folder, ["w5 w6"], control) for control in (False, None))
    assert f"base:\n{base}\n" in output and f"controlled:\n{controlled}\n" in output
    assert f"controlled:\n{base}\n" in output  # at strength 0
    assert "/strength takes a number, got 'much'" in output and "too large for this head" in output
    assert "default=1\nother=0\n" in output and "default=0\nother=0.5\n" in output and "'nobody'" in output
    assert "/clear" in output.split("other=0.5")[1]  # the help


def test_without_a_chat_template_and_wrong_words(folder):
    output = chat(folder, "w5", words=["-m", str(folder / "plain"), "--mode", "off"])
    assert "no chat template" in output
    chat(folder, words=["--value-head", "polite"], code=2)
    chat(folder, words=["--method", "static"], code=1)


def test_what_does_not_fit_is_told_and_a_keypress_stops_one_answer(folder):
    output = chat(folder, "w5", words=["--max-new-tokens", "100000", "--mode", "on"])
    assert "do not fit" in output
    process = subprocess.Popen(
        [COMMAND, "chat", folder / "head", "--max-new-tokens", "400", "--mode", "on"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    process.stdin.write("w5 w6\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert "/help" in line
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate("/exit\n", timeout=300)
    assert process.returncode == 0, rest
