"""What stands before vLLM's server, before an application of our own: no vLLM is needed."""

import asyncio
import json

import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from hf_recontrol.integrations.vllm.middleware import ControlFields, with_fields

PATH = "/v1/completions"


class Client:
    """One request, its body in parts; behind these the client leaves."""

    def __init__(self, *parts, ends=True):
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if ends:
            self.messages[-1]["more_body"] = False
        self.read, self.sent = 0, []

    async def receive(self):
        self.read += 1
        return self.messages.pop(0) if self.messages else {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def ask(self, app, path=PATH, **headers):
        headers = {"content-type": "application/json"} | headers
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "state": {},
        }
        asyncio.run(app(scope, self.receive, self.send))
        body = b"".join(message.get("body", b"") for message in self.sent)
        return self.sent[0]["status"], json.loads(body)


class Key:
    """The check of a key, as vLLM's server has it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        is_known = (b"authorization", b"Bearer key") in scope["headers"]
        app = self.app if is_known else JSONResponse({"error": "Unauthorized"}, 401)
        await app(scope, receive, send)


@pytest.fixture
def app():
    """Tells what it gets, behind a key, and shows errors in a form of its own, as vLLM's server does."""
    app = FastAPI()
    app.state.args = type("Args", (), {"served_model_name": ["tiny", "tiny:polite"]})

    @app.post(PATH)
    async def complete(body: dict, request: Request):
        return {"body": body, "next": (await request.receive())["type"]}

    @app.exception_handler(HTTPException)
    async def refused(request, error):
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    app.add_middleware(Key)
    app.add_middleware(ControlFields)
    return app


def test_a_body_is_changed_whole_however_it_comes(app):
    body = json.dumps({"model": "tiny:polite", "prompt": "x", "control": {"step_size": 2}}).encode()
    for parts in ([body], [body[:9], b"", body[9:]], [body[i : i + 1] for i in range(len(body))], [body, b""]):
        status, answer = Client(*parts).ask(app, authorization="Bearer key")
        extra = {"control": '{"step_size": 2}', "recontrol_model": "tiny:polite"}
        assert status == 200 and answer["next"] == "http.disconnect"
        assert answer["body"] == {"model": "tiny:polite", "prompt": "x", "vllm_xargs": extra}


def test_nothing_is_read_of_who_has_no_key(app):
    client = Client(b'{"control": false}')
    assert client.ask(app)[0] == 401
    assert client.read == 0


def test_what_cannot_be_carried_is_400_in_words(app):
    status, answer = Client(b'{"control": false, "vllm_xargs": {"control": false}}').ask(
        app, authorization="Bearer key"
    )
    assert status == 400 and "named twice" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/embeddings"])
def test_control_is_refused_where_vllm_would_drop_it(path):
    body = json.dumps({"model": "tiny", "control": False}).encode()
    with pytest.raises(ValueError, match=f"{path} cannot be controlled by a request"):
        with_fields(body, path, ["tiny:polite"])
    plain = b'{"model": "tiny"}'
    assert with_fields(plain, path, ["tiny:polite"]) == plain


def test_a_client_that_leaves_in_its_body_ends_the_request(app):
    client = Client(b'{"mod', b'el":', ends=False)
    # Nobody gets this answer.
    assert client.ask(app, authorization="Bearer key")[0] == 400
