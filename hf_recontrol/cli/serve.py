"""A controlled model behind an OpenAI-compatible API: `recontrol serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..settings import LoadingSettings
from .app import app
from .controlled import MaxKLOption, MethodOption, NumStepsOption, PlausibilityOption, StepSizeOption, load_controlled
from .options import with_settings

_KEY = "RECONTROL_API_KEY"
_LOCAL = ("127.0.0.1", "localhost", "::1")


def _named_heads(given: list[str]) -> dict[str, str]:
    """Heads by name, as `--value-head` names them; `NAME=` may be left out of one, which is then `default`."""
    heads: dict[str, str] = {}
    for text in given:
        name, is_named, source = text.partition("=")
        # A folder's path may hold '=' too.
        if not is_named or os.sep in name or "/" in name:
            name, source = "default", text
        if not source or name in heads:
            raise typer.BadParameter(f"is NAME=HEAD, each name once, got {text!r}", param_hint="--value-head")
        heads[name] = source
    return heads


@app.command()
@with_settings(LoadingSettings, from_file=False)
def serve(
    settings: LoadingSettings,
    base: Annotated[str, typer.Argument(help="Base model; or, without --value-head, a head that names its base.")],
    value_head: Annotated[
        list[str] | None,
        typer.Option(
            help="HEAD or NAME=HEAD: a folder or a Hub repo. May be repeated; the first one acts where a request "
            "chooses none."
        ),
    ] = None,
    method: MethodOption = None,
    step_size: StepSizeOption = None,
    num_steps: NumStepsOption = None,
    plausibility: PlausibilityOption = None,
    max_kl: MaxKLOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            show_envvar=False,
            help=f"What requests must bring. Others on this machine may see it on a command line, not in {_KEY}.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the base; default: its Hub name, or its folder's name.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 2**22,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests at once at most, those that wait for their turn included.")
    ] = 64,
) -> None:
    """Serve a base under control behind an OpenAI-compatible API, with a control for each request.

    Example: `recontrol serve org/base --value-head user/head --port 8000`
    """
    from ..integrations.request_settings import RequestSettings
    from ..integrations.server.app import build_app, listen
    from ..integrations.server.app import serve as run

    if api_key is not None and not api_key.strip():
        raise typer.BadParameter("is empty", param_hint="--api-key")
    if api_key is None and host not in _LOCAL:
        typer.echo(f"Anybody who reaches {host}:{port} can use this server: set {_KEY}.", err=True)
    heads = _named_heads(value_head or [base])
    listener = listen(host, port)
    name, source = next(iter(heads.items()))
    changes = {"method": method, "step_size": step_size, "num_steps": num_steps}
    changes |= {"plausibility": plausibility, "max_kl": max_kl}
    model, tokenizer = load_controlled(source, base if value_head else None, changes, settings)
    if name != "default":
        model.add_value_head(name, model.value_head)
        model.set_value_heads({name: 1.0})
        model.delete_value_head("default")
    for other, place in list(heads.items())[1:]:
        model.add_value_head(other, place, token=settings.token)
    shown = served_model_name or str(model.config._name_or_path)
    if served_model_name is None and os.path.isdir(shown):
        shown = Path(shown).resolve().name
    configs = {name: model.value_heads[name].config for name in heads}
    requests = RequestSettings(shown, configs, model.control)
    application = build_app(
        model, tokenizer, requests, api_key=api_key, max_body_bytes=max_body_bytes, max_requests=max_requests
    )
    shown_host = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving {', '.join(requests.models)} at http://{shown_host}:{listener.getsockname()[1]}/v1")
    run(application, listener)
