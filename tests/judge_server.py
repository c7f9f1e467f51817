"""A real HTTP server that judges like an OpenAI-compatible endpoint, and misbehaves when told to."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PROBE = "Reply with the word OK."
BODIES = {
    "broken": b"{broken",
    "list": b"[1]",
    "deep": b"[" * 100_000,
    "digits": b'{"choices": ' + b"9" * 5000 + b"}",
}
FAULTS = ("half", "slow", "trickle", "flood", *BODIES)


def answers_in(asked: str) -> list[str]:
    """The answers that a question holds: two, or one to score."""
    if "<answer>\n" in asked:
        return [asked.split("<answer>\n")[1].split("\n</answer>")[0]]
    return [asked.split(f"<answer {x}>\n")[1].split(f"\n</answer {x}>")[0] for x in "AB"]


def judged_by_length(asked: str) -> str:
    """The longer answer wins; the score is the number of words."""
    answers = answers_in(asked)
    if len(answers) == 1:
        return json.dumps({"score": min(10, max(1, len(answers[0].split())))})
    first, second = map(len, answers)
    return json.dumps({"verdict": "A" if first > second else "B" if second > first else "tie"})


class JudgeServer(ThreadingHTTPServer):
    """
    Attributes:
        faults (`list`):
            What the next calls get instead of a verdict: a status, one of `FAULTS`, a text.
        always:
            The same for all calls.
        ends_by (`str`):
            Why each reply ends.
        hold_after (`int`, *optional*):
            Calls beyond so many are not answered, until `release` is set.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.always, self.hold_after, self.ends_by = [], None, None, "stop"
        self.lock, self.release = threading.Lock(), threading.Event()
        self.calls, self.probes, self.at_once, self.most_at_once = 0, 0, 0, 0
        self.begun, self.answered, self.keys = Counter(), Counter(), set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"]
        is_probe = asked == _PROBE
        with server.lock:
            server.last = body
            server.keys.add(self.headers.get("Authorization"))
            server.probes += is_probe
            server.calls += not is_probe
            server.begun[asked] += 1
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            kind = server.faults.pop(0) if server.faults and not is_probe else server.always
            held = server.hold_after is not None and server.calls > server.hold_after
        if held:
            server.release.wait(60)
        elif kind == "slow":
            time.sleep(1.5)
        with server.lock:
            server.at_once -= 1
        with contextlib.suppress(OSError):  # nobody waits any more
            self._answer(asked, is_probe, kind)
            if not held:
                server.answered[asked] += 1

    def _answer(self, asked, is_probe, kind):
        status = kind if isinstance(kind, int) else 200
        text = kind if isinstance(kind, str) and kind not in FAULTS else None
        if text is None:
            text = "OK" if is_probe else f"Well. {judged_by_length(asked)}"
        reply = {
            "choices": [
                {"index": 0, "finish_reason": self.server.ends_by, "message": {"role": "assistant", "content": text}}
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
        }
        if status != 200:
            reply = {"error": {"message": f"no: {self.headers.get('Authorization')} {status}"}}
        data = BODIES.get(kind, json.dumps(reply).encode())
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data) + {"half": 50, "trickle": 50, "flood": 2**40}.get(kind, 0)))
        self.end_headers()
        while kind in ("trickle", "flood"):
            self.wfile.write(b" " if kind == "trickle" else bytes(2**20))
            time.sleep(0.1 if kind == "trickle" else 0)
        self.wfile.write(data)
        self.close_connection = True


@contextlib.contextmanager
def running_server():
    server = JudgeServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
