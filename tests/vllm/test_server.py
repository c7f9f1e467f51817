"""vLLM's OpenAI server of a controlled model, and real clients."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from .test_requests import ASKED, BAD, prompts

openai = pytest.importorskip("openai")

PROGRAM = """
import json, sys
from hf_recontrol.integrations.vllm.arguments import serve_vllm
serve_vllm(**json.loads(sys.argv[1]))
"""


class Server:
    """A server in a process of its own."""

    def __init__(self, served, log, **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        settings = {"base": served.base, "heads": served.heads, "port": self.port, "api_key": "secret"}
        more = ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "32"]
        self.settings = {"served_model_name": "tiny", "extra_arguments": more} | settings | changes
        self.log = log
        self.process = None

    def start(self) -> "Server":
        # The server is as others start it: its engine compiled, in a process of its own.
        environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        with open(self.log, "ab") as log:
            command = [sys.executable, "-c", PROGRAM, json.dumps(self.settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return self
            except (URLError, OSError):
                time.sleep(0.5)
        self.kill()
        with open(self.log, encoding="utf-8", errors="replace") as log:
            raise RuntimeError(f"The server did not start: {log.read()[-3000:]}")

    def kill(self) -> None:
        """As nobody wants it: all its processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def client(self):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def server(served, tmp_path_factory):
    running = Server(served, tmp_path_factory.mktemp("server") / "log").start()
    yield running
    running.kill()


def complete(client, prompt, extra, tokens=8, **changes):
    """A completion's token ids. `extra` as in-process, its model as clients name it, its fields at the top."""
    body = {name: value for name, value in extra.items() if name in ("control", "value_heads")}
    answer = client.completions.create(
        model=extra.get("recontrol_model", "tiny"),
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True} | body,
        **changes,
    )
    return answer.choices[0].token_ids


def test_each_head_is_a_model(server):
    assert [model.id for model in server.client.models.list()] == ["tiny", "tiny:default", "tiny:polite"]
    with pytest.raises(openai.NotFoundError, match="tiny:polite"):
        complete(server.client, [5, 6], {"recontrol_model": "tiny:rude"})
    with pytest.raises(openai.AuthenticationError):
        complete(server.client.with_options(api_key="guessed"), [5, 6], {})


@pytest.mark.parametrize("key", ["guessed", "secret"])
def test_who_has_no_key_is_refused_before_anything_of_the_body_is_read(server, key):
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 100"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as place:
        place.sendall("\r\n".join([*head, f"Authorization: Bearer {key}", "", "{"]).encode())
        if key == "guessed":
            assert place.recv(100).startswith(b"HTTP/1.1 401")
        else:
            place.settimeout(1)
            with pytest.raises(TimeoutError):
                place.recv(100)


def test_two_hundred_requests_of_all_kinds_at_once_are_each_what_our_wrapper_says(server, says):
    """With refused ones among them, which leave the others alone."""
    asked = [(prompt, *ASKED[i % len(ASKED)]) for i, prompt in enumerate(prompts(200, seed=7))]
    bad = [extra for extra, _ in BAD if "nan" not in str(extra)]

    def ask(number):
        prompt, extra, _ = asked[number]
        if number % 10 == 3:
            kind = openai.NotFoundError if "recontrol_model" in bad[number % len(bad)] else openai.BadRequestError
            with pytest.raises(kind):
                complete(server.client, prompt, bad[number % len(bad)])
        return complete(server.client, prompt, extra, tokens=6)

    with ThreadPoolExecutor(24) as pool:
        said = list(pool.map(ask, range(len(asked))))
    for (prompt, extra, ours), tokens in zip(asked, said, strict=True):
        assert tokens == says(prompt, tokens=6, **ours), extra


@pytest.mark.parametrize(("extra", "words"), [case for case in BAD if "nan" not in str(case)])
def test_a_bad_request_gets_400_and_our_words(server, extra, words):
    kind = openai.NotFoundError if "recontrol_model" in extra else openai.BadRequestError
    with pytest.raises(kind, match=words):
        complete(server.client, [5, 6], extra)


def test_fields_may_stand_in_vllm_s_own_place_and_with_any_client(server, says):
    def ask(**extra):
        body = {"ignore_eos": True, "return_token_ids": True, **extra}
        return server.client.completions.create(
            model="tiny", prompt=[5, 6], max_tokens=8, temperature=0, extra_body=body
        )

    for control in (False, "false"):
        answer = ask(vllm_xargs={"control": control, "somebody": "else"})
        assert answer.choices[0].token_ids == says([5, 6], control=False)
    with pytest.raises(openai.BadRequestError, match="named twice"):
        ask(control=False, vllm_xargs={"control": False})
    with pytest.raises(openai.BadRequestError, match="beam search"):
        ask(control=False, use_beam_search=True)
    with pytest.raises(openai.BadRequestError, match="control` false"):
        ask(prompt_logprobs=1)
    assert ask(prompt_logprobs=1, control=False).choices[0].prompt_logprobs is not None


def test_an_answer_streams(server, says):
    stream = server.client.chat.completions.create(
        model="tiny:polite",
        messages=[{"role": "user", "content": "w9 w8"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "control": {"step_size": 0.7}},
    )
    parts = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    whole = server.client.chat.completions.create(
        model="tiny:polite",
        messages=[{"role": "user", "content": "w9 w8"}],
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, "control": {"step_size": 0.7}},
    )
    assert len(parts) > 4 and "".join(part or "" for part in parts) == whole.choices[0].message.content


def test_a_client_that_leaves_in_the_middle_harms_nobody(server, says):
    for _ in range(3):
        stream = server.client.completions.create(
            model="tiny", prompt=[5, 6], max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    assert complete(server.client, [7, 8, 9], {}) == says([7, 8, 9])


def test_a_server_that_was_killed_starts_again_and_says_the_same(server):
    before = complete(server.client, [5, 6, 7], ASKED[10][0])
    server.kill()
    with pytest.raises(openai.APIConnectionError):
        complete(server.client, [5, 6, 7], {})
    server.start()
    assert complete(server.client, [5, 6, 7], ASKED[10][0]) == before
