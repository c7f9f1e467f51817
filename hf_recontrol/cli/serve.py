"""A controlled model behind an OpenAI-compatible API: `recontrol serve`."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..settings import LoadingSettings
from .app import app
from .controlled import (
    HeadRevisionOption,
    MaxKLOption,
    MethodOption,
    NumStepsOption,
    PlausibilityOption,
    StepSizeOption,
    load_controlled,
    named_heads,
    resolve_controlled,
    share_token,
)
from .options import with_settings

_KEY = "RECONTROL_API_KEY"
_BODY_BYTES, _REQUESTS = 2**22, 64
_LOCAL = ("127.0.0.1", "localhost", "::1")


def _served_name(base: str | os.PathLike) -> str:
    """What clients call a base: its Hub name, or its folder's."""
    return Path(base).resolve().name if os.path.isdir(base) else str(base)


def _shown_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@app.command()
@with_settings(LoadingSettings, from_file=False)
def serve(
    settings: LoadingSettings,
    base: Annotated[str, typer.Argument(help="Base model; or, without --value-head, a head that names its base.")],
    vllm_argument: Annotated[
        list[str] | None, typer.Argument(help="With --engine vllm, behind `--`: arguments of `vllm serve`.")
    ] = None,
    value_head: Annotated[
        list[str] | None,
        typer.Option(
            help="HEAD or NAME=HEAD: a folder or a Hub repo. May be repeated; the first one acts where a request "
            "chooses none."
        ),
    ] = None,
    engine: Annotated[
        Literal["transformers", "vllm"], typer.Option(help="transformers: one answer at a time; vllm: many at once.")
    ] = "transformers",
    head_revision: HeadRevisionOption = None,
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
    max_body_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of a request at most; default: 4 MiB. Not with vLLM.")
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at once at most, those that wait included; default: 64. Not with vLLM."),
    ] = None,
) -> None:
    """Serve a base under control behind an OpenAI-compatible API, with a control for each request.

    Example: `recontrol serve org/base --value-head user/head --port 8000`
    """
    # An empty variable counts as none given.
    is_empty = api_key is None and os.environ.get(_KEY) == ""
    if is_empty or (api_key is not None and not api_key.strip()):
        raise typer.BadParameter("is empty", param_hint="--api-key")
    if api_key is not None and not all("!" <= character <= "~" for character in api_key):
        # Others reach no server as they are: headers lose spaces at their ends, and clients send ASCII alone.
        raise typer.BadParameter("may hold ASCII letters, digits and signs, no spaces", param_hint="--api-key")
    if api_key is None and host not in _LOCAL:
        typer.echo(f"Anybody who reaches {host}:{port} can use this server: set {_KEY}.", err=True)
    if engine == "transformers" and vllm_argument:
        raise typer.BadParameter(f"are for `--engine vllm`, got {vllm_argument[0]!r}", param_hint="arguments")
    heads = named_heads(value_head or [base])
    if head_revision is not None and (len(heads) > 1 or engine == "vllm"):
        raise typer.BadParameter("is of one head, with `--engine transformers`", param_hint="--head-revision")
    changes = {"method": method, "step_size": step_size, "num_steps": num_steps}
    changes |= {"plausibility": plausibility, "max_kl": max_kl}
    place = {"base": base if value_head else None, "host": host, "port": port, "api_key": api_key}
    limits = {"max_body_bytes": max_body_bytes, "max_requests": max_requests}
    if engine == "vllm":
        if given := [name for name, value in limits.items() if value is not None]:
            raise typer.BadParameter("is for `--engine transformers`", param_hint=f"--{given[0].replace('_', '-')}")
        _serve_on_vllm(heads, changes, settings, name=served_model_name, more=vllm_argument or [], **place)
    else:
        limits = {"max_body_bytes": max_body_bytes or _BODY_BYTES, "max_requests": max_requests or _REQUESTS}
        place["head_revision"] = head_revision
        _serve_on_transformers(heads, changes, settings, name=served_model_name, **limits, **place)


def _serve_on_transformers(
    heads: dict[str, str],
    changes: dict[str, Any],
    settings: LoadingSettings,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    head_revision: str | None,
    name: str | None,
    max_body_bytes: int,
    max_requests: int,
) -> None:
    from ..heads.value_head import ValueHead
    from ..integrations.request_settings import RequestSettings
    from ..integrations.server.app import build_app, listen
    from ..integrations.server.app import serve as run

    listener = listen(host, port)
    (first, source), *others = heads.items()
    loaded = {other: ValueHead.from_pretrained(place, token=settings.token) for other, place in others}
    model, tokenizer = load_controlled(source, base, changes, settings, head_revision)
    if first != "default":
        model.add_value_head(first, model.value_head)
        model.set_value_heads({first: 1.0})
        model.delete_value_head("default")
    for other, head in loaded.items():
        model.add_value_head(other, head)
    configs = {head: model.value_heads[head].config for head in heads}
    requests = RequestSettings(name or _served_name(model.config._name_or_path), configs, model.control)
    application = build_app(
        model, tokenizer, requests, api_key=api_key, max_body_bytes=max_body_bytes, max_requests=max_requests
    )
    place = f"http://{_shown_host(host)}:{listener.getsockname()[1]}/v1"
    typer.echo(f"Serving {', '.join(requests.models)} at {place}")
    run(application, listener)


def _serve_on_vllm(
    heads: dict[str, str],
    changes: dict[str, Any],
    settings: LoadingSettings,
    base: str | None,
    host: str,
    port: int,
    api_key: str | None,
    name: str | None,
    more: list[str],
) -> None:
    from ..integrations.vllm.arguments import serve_vllm

    given = {item.name: value for item in fields(settings) if (value := getattr(settings, item.name)) != item.default}
    if unknown := sorted(given.keys() - {"dtype", "revision", "trust_remote_code", "token"}):
        raise typer.BadParameter(
            "is for `--engine transformers`: behind `--` stand vLLM's own arguments",
            param_hint=f"--{unknown[0].replace('_', '-')}",
        )
    found, wanted = resolve_controlled(next(iter(heads.values())), base, changes, settings)
    share_token(settings)
    revision = settings.revision or found.revision
    more = [
        *([] if revision is None else ["--revision", revision]),
        *(["--trust-remote-code"] if settings.trust_remote_code else []),
        *("--dtype", settings.dtype),
        *more,
    ]
    name = name or _served_name(found.base)
    models = ", ".join([name, *(f"{name}:{head}" for head in heads)])
    typer.echo(f"Starting vLLM, which serves {models} at http://{_shown_host(host)}:{port}/v1 when it is ready.")
    serve_vllm(str(found.base), heads, wanted, host, port, api_key, name, more)
