"""`recontrol chat`: real conversations with the command, line by line."""

import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from transformers import GenerationConfig

from hf_recontrol import ControlConfig, ReControlForCausalLM, generate_rollouts
from hf_recontrol.cli.chat import Chat
from hf_recontrol.collection.sampling import sampling_config
from hf_recontrol.settings import SamplingSettings, TemplateSettings

from .fresh import RECONTROL, run_fresh
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

COMMAND = str(Path(sys.executable).with_name("recontrol"))
# Markup, wide characters, a word that no column holds, a name of an emoji, a change of the terminal's colours.
ODD = ("[red]{}", "🎉{}", "漢字{}", "x" * 60 + "{}", "[/bold]{}", ":smile:{}", "\x1b[31m{}", "ee\u0301{}")


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
    # Says odd words, and never ends by itself.
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=2048)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder / "odd")
    words = tuple(ODD[i % len(ODD)].format(i) for i in range(92))
    tiny_tokenizer(chat=True, more_words=words).save_pretrained(folder / "odd")
    return folder


def chat(folder, *lines, words=(), code=0):
    found, out, err = run_fresh(
        RECONTROL,
        ["chat", folder / "head", "--max-new-tokens", "6", *words],
        # A pipe is no terminal, whatever else it may be taken for.
        os.environ | {"FORCE_COLOR": "1", "COLUMNS": "200"},
        timeout=300,
        typed="".join(f"{line}\n" for line in lines),
    )
    assert found == code, out + err
    assert "Traceback" not in err
    return out


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
    lines = ["w5 w6", "/strength 0", "/clear", "w5 w6", "/strength much", "/strength 1e39", "w5", "/strength 3"]
    lines += ["/off", "/clear", "w5 w6", "/heads", "/heads nobody=1", "/heads other=0.5", "/nonsense"]
    output = chat(folder, *lines, words=["--temperature", "0", "--value-head", f"other={folder / 'head'}"])
    [base], [controlled] = (expected(folder, ["w5 w6"], control) for control in (False, None))
    assert f"base:\n{base}\n" in output and f"controlled:\n{controlled}\n" in output
    assert f"controlled:\n{base}\n" in output  # at strength 0
    assert "/strength takes a number, got 'much'" in output and "too large for this head" in output
    assert "default=1\nother=0\n" in output and "default=0\nother=0.5\n" in output and "'nobody'" in output
    assert "Answers as the base." in output and "What was said is forgotten." in output
    assert "/clear" in output.split("other=0.5")[1]  # the help


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_trace_is_of_the_very_answers_that_were_shown(temperature, tmp_path, capsys):
    base, tokenizer = tiny_model("llama", dtype=torch.float32), tiny_tokenizer(chat=True)
    head, other = (tiny_head(base, "lm_head", seed=seed, control=ControlConfig("advantage", 3.0)) for seed in (0, 1))
    # Settings of the base's authors, which neither `generate` nor `trace` follows.
    base.generation_config.repetition_penalty, base.generation_config.top_p = 5.0, 0.1
    model = ReControlForCausalLM.from_model(base, head)
    model.add_value_head("other", other)
    sampling = SamplingSettings(max_new_tokens=8, temperature=temperature)
    chat = Chat(model, tokenizer, TemplateSettings(), sampling_config(model, tokenizer, sampling), "both", 3)
    for text in ("w5 w6", "w7"):
        chat.say(text)
        shown = capsys.readouterr().out
    answers = [text.strip() for text in re.fullmatch(r"base:\n(.*)\ncontrolled:\n(.*)\n", shown).groups()]
    assert answers[0] != answers[1] == chat.messages[-1]["content"].strip()
    for text, control in zip(answers, (False, model.control), strict=True):
        drawn = generate_rollouts(model, tokenizer, [chat.messages[:-1]], sampling, control=control, seed=4)
        assert text == drawn[0].completion.strip() and len(drawn[0].completion_ids) > 1
    # What is set behind an answer is not what it was drawn under.
    for line in ("/strength 0.5", "/heads other=1", f"/trace '{tmp_path / 'page.html'}'"):
        chat.command(line)
    traced = json.loads((tmp_path / "page.json").read_text())
    assert [traced[who]["text"].strip() for who in ("base", "controlled")] == answers
    assert traced["control"]["step_size"] == 3 and traced["heads"] == {"default": 1.0}


def test_a_token_without_an_embedding_is_told():
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_tokens(["<extra>"])
    chat = Chat(tiny_model("llama"), tokenizer, TemplateSettings(), GenerationConfig(max_new_tokens=2), "on", 0)
    with pytest.raises(ValueError, match="'<extra>' has the id 97"):
        chat.encode([{"role": "user", "content": "w5 <extra>"}])


def test_without_a_chat_template_and_wrong_words(folder):
    output = chat(folder, "w5", words=["-m", str(folder / "plain"), "--mode", "off"])
    assert "no chat template" in output
    chat(folder, words=["--value-head", "polite"], code=2)
    chat(folder, words=["--method", "static"], code=1)


def test_what_does_not_fit_is_told_and_a_keypress_stops_one_answer(folder):
    output = chat(folder, "w5", words=["--max-new-tokens", "100000", "--mode", "on"])
    assert "do not fit" in output
    words = ["--temperature", "0", "--max-new-tokens", "1800", "--mode", "on"]
    process = subprocess.Popen(
        [COMMAND, "chat", folder / "head", "-m", folder / "odd", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write("w5 w6\n")
    process.stdin.flush()
    assert "/help" in process.stdout.readline()
    # The prompt, and the first letters of an answer that is long enough to be stopped.
    assert len(process.stdout.read(8)) == 8
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate("/history\n/exit\n", timeout=300)
    assert process.returncode == 0 and "(stopped; this message is not remembered)" in rest, rest
    assert "user: " not in rest


def _plain(shown):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, columns, *words):
        self.place, inside = os.openpty()
        self.resize(columns)
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        program = (
            "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        sizes = ("COLUMNS", "LINES")
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, COMMAND, "chat", *map(str, words)],
            stdin=inside,
            stdout=inside,
            # Where Python writes a prompt.
            stderr=inside,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in sizes} | {"TERM": "xterm-256color"},
        )
        os.close(inside)
        self.read_to(r"ends\.\r\n> $")

    def resize(self, columns):
        fcntl.ioctl(self.place, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, text):
        os.write(self.place, text.encode())

    def read_to(self, pattern, again=None):
        """What is shown until its text is so; a key `again` is pressed again where nothing comes of it."""
        shown, deadline = b"", time.monotonic() + 120
        while not re.search(pattern, _plain(shown.decode(errors="ignore"))):
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.place], [], [], left if again is None else min(left, 5))
            assert ready or (again and left), shown
            if ready:
                shown += os.read(self.place, 2**16)
            else:
                self.type(again)
        return shown.decode().replace("\r\n", "\n")

    def say(self, line):
        self.type(f"{line}\n")
        return self.read_to(r"\n> $")

    def end(self):
        self.type("/exit\n")
        code = self.process.wait(60)
        os.close(self.place)
        return code


def columns_of(shown):
    """The texts of the last frame, by their names, without spaces; its lines."""
    frame = shown.split("\x1b[2K")[-1].split("\x1b[?25h")[0]
    names, _, *lines = _plain(frame).strip("\n").split("\n")
    texts = ["".join("".join(parts).split()) for parts in zip(*(line.split("│") for line in lines), strict=True)]
    return dict(zip((name.strip() for name in names.split("│")), texts, strict=True)), [names, *lines]


def test_a_terminal_shows_both_answers_side_by_side_where_it_has_room(folder):
    words = (folder / "head", "-m", folder / "odd", "--temperature", "0", "--max-new-tokens", "300")
    terminal = Terminal(100, *words)
    beside, lines = columns_of(terminal.say("w5 w6"))
    # Higher than the terminal, and every line as wide as the others.
    assert len(lines) > 24 and len({cell_len(line.split("│")[0]) for line in lines}) == 1
    assert all(cell_len(line) <= 100 for line in lines)

    terminal.say("/clear")
    terminal.resize(79)
    shown = terminal.say("w5 w6")
    assert "\x1b[2K" not in shown and "│" not in shown
    base, controlled = re.search(r"base:\n(.*)\ncontrolled:\n(.*)\n> $", shown, flags=re.DOTALL).groups()
    assert base != controlled and all(odd.format("") in base for odd in ODD)
    below = {"base": base, "controlled": controlled}
    assert beside == {name: "".join(text.replace("\x1b", "␛").split()) for name, text in below.items()}

    assert terminal.end() == 0

    # Long enough that the key arrives before the answer ends.
    terminal = Terminal(80, *words[:-1], "1800")
    terminal.type("w5 w6\n")
    # The first words of the first answer.
    terminal.read_to(r"│.*\n.*\n.*\S.*│")
    terminal.type("\x03")
    shown = terminal.read_to(r"\n> $")
    assert "(stopped" in shown and shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    stopped, _ = columns_of(shown)
    shared = min(len(stopped["base"]), len(beside["base"]))
    assert shared and beside["base"][:shared] == stopped["base"][:shared]
    assert "user" not in terminal.say("/history") and "step size 3" in terminal.say("/strength")
    # At the prompt it ends nothing: there is a chat to lose.
    # Python's `input` does not see one between its prompt and its read before the next.
    terminal.type("\x03")
    assert "/exit ends" in terminal.read_to(r"\n> $", again="\x03")
    assert "step size 3" in terminal.say("/strength")
    assert terminal.end() == 0
