"""A real HTTP server whose completions return token ids, as vLLM's do, of a tiny model; it misbehaves when told to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

# Seconds, more than a test lets it wait.
_SILENCE = 60
_EXPECTED = {
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


class EngineServer(ThreadingHTTPServer):
    """
    Attributes:
        requests (`list[dict]`):
            The bodies of completions that were answered.
        faults (`dict`):
            What an answer holds instead: fields of the choice by name (`None` leaves one out), `status`, or `page`,
            which is no JSON.
        dies_after (`int`, *optional*):
            Requests beyond so many get no answer.
        models (`list[str]`):
            What it says that it serves.
        max_model_len (`int`, *optional*):
            And for how many tokens.
        silent (`bool`):
            Whether completions are taken and not answered.
        lists (`bool`):
            Whether it answers what it serves.
        key (`str`, *optional*):
            What clients must send.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, model, tokenizer, models=("tiny",)):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.models = model, tokenizer, list(models)
        self.requests, self.faults, self.dies_after, self.key = [], {}, None, None
        self.max_model_len, self.silent, self.lists = None, False, True
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @torch.no_grad()
    def complete(self, body: dict) -> dict:
        prompt, drawn, reason = body["prompt"], [], "length"
        generator = torch.Generator().manual_seed(body["seed"])
        while len(drawn) < body["max_tokens"] and reason == "length":
            logits = self.model(torch.tensor([prompt + drawn])).logits[0, -1].float()
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                logits = logits / body["temperature"]
                if body["top_k"]:
                    logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
                token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            drawn.append(token)
            text = self.tokenizer.decode(drawn)
            if token in body["stop_token_ids"] or any(stop in text for stop in body["stop"]):
                reason = "stop"
        choice = {"index": 0, "text": "", "finish_reason": reason, "token_ids": drawn, "prompt_token_ids": prompt}
        return {name: value for name, value in (choice | self.faults).items() if name != "status"}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.server.lists:
            return threading.Event().wait(_SILENCE)
        card = {"object": "model", "max_model_len": self.server.max_model_len}
        return self._send(200, {"object": "list", "data": [card | {"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or body["model"] not in server.models:
            return self._send(404, {"error": {"message": "no such thing"}})
        if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
            return self._send(401, {"error": {"message": "no"}})
        if "status" in server.faults:
            return self._send(server.faults["status"], {"error": {"message": "It is too long for me."}})
        if "page" in server.faults:
            return self._send(200, server.faults["page"], "text/html")
        assert {name: body[name] for name in _EXPECTED} == _EXPECTED, body
        assert body["vllm_xargs"] == {"control": "false"}
        if server.silent:
            return threading.Event().wait(_SILENCE)
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            choice = server.complete(body)
        finally:
            with server.lock:
                server.at_once -= 1
                server.requests.append(body)
                dead = server.dies_after is not None and len(server.requests) > server.dies_after
        if dead:
            self.connection.close()
            return None
        choice = {name: value for name, value in choice.items() if value is not None}
        return self._send(
            200, {"id": "c", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        )

    def _send(self, status, body, kind="application/json"):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
