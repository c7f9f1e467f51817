"""A chat in the terminal: `recontrol chat`, with the base's answers beside the controlled ones."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..settings import LoadingSettings, SamplingSettings, SeedSettings, TemplateSettings
from ..utils.setting_fields import settings_class
from .app import app
from .controlled import (
    HeadArgument,
    HeadRevisionOption,
    MaxKLOption,
    MethodOption,
    StepSizeOption,
    load_controlled,
    named_heads,
)
from .options import with_settings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

    from ..configuration import ControlConfig

HELP = """\
/both               answer twice, as the base and under control, side by side where the terminal has 80 columns or
                    more; the chat goes on with the controlled answer
/on, /off           answer under control alone, or as the base alone
/strength [X]       show or set the step size
/heads [NAME=X ...] show the heads and their weights, or set these; heads that are not named do not act
/trace [FILE]       what control did at each token of the last answer: a page (default: trace.html)
/clear              forget what was said
/history            show what was said
/help               this text
/exit               end; so does Ctrl-D"""


_ANSWERS = {
    "both": "Answers twice, as the base and under control.",
    "on": "Answers under control.",
    "off": "Answers as the base.",
}


@settings_class("Options")
class _ChatSettings(SeedSettings, TemplateSettings, LoadingSettings):
    """What `recontrol chat` can be told of how it computes."""


class Chat:
    """
    A chat and its commands; all it says goes to standard output.

    Args:
        model ([`~transformers.PreTrainedModel`]), tokenizer:
            Who answers: a model under the control of heads.
        settings ([`TemplateSettings`]):
            How what is said is formatted. Without a chat template each message is a text to go on with, and nothing of
            before is remembered.
        config ([`~transformers.GenerationConfig`]):
            How answers are drawn.
        mode (`"both"`, `"on"` or `"off"`):
            Which answers are given.
        seed (`int`):
            Of the first answer; each next one has the next seed. Base and controlled answer have the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TemplateSettings,
        config: GenerationConfig,
        mode: Literal["both", "on", "off"],
        seed: int,
    ):
        from ..data.templating import PromptEncoder

        self.model, self.tokenizer, self.config, self.mode, self.seed = model, tokenizer, config, mode, seed
        self.encoder = PromptEncoder(tokenizer, settings)
        self.remembers = bool(tokenizer.chat_template)
        self.messages: list[dict[str, str]] = []
        # What was asked last, whole, the seed of its answer, and the control and the weights that were in force.
        self.last: tuple[str | list[dict[str, str]], int, ControlConfig, Mapping] | None = None

    def run(self) -> None:
        """Read lines until the end."""
        control = self.model.control
        typer.echo(f"{control.method}, step size {control.step_size:g}. /help shows the commands, /exit ends.")
        if not self.remembers:
            typer.echo("This base has no chat template: each line is a text to go on with, and none is remembered.")
        while True:
            try:
                line = input("> ").strip()
            except KeyboardInterrupt:
                typer.echo("\n(Ctrl-D or /exit ends)")
                continue
            except EOFError:
                typer.echo()
                return
            except UnicodeDecodeError as error:
                typer.echo(f"That line is not {error.encoding}: {error.reason}.")
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.say(line)
            except KeyboardInterrupt:
                typer.echo("\n(stopped; this message is not remembered)")
            # A step size that is too large, or a page that cannot be written, ends an answer, not the chat.
            except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
                typer.echo(f"{error}")

    def command(self, line: str) -> None:
        """Do what a line that begins with `/` asks for."""
        try:
            name, *words = shlex.split(line[1:]) or [""]
        except ValueError as error:
            raise ValueError(f"{line}: {error}.") from error
        if name in ("both", "on", "off") and not words:
            self.mode = name
            typer.echo(_ANSWERS[self.mode])
        elif name == "strength" and len(words) <= 1:
            if words:
                self.model.control = replace(self.model.control, step_size=_number("/strength", words[0]))
            typer.echo(f"{self.model.control.method}, step size {self.model.control.step_size:g}")
        elif name == "heads":
            if words:
                pairs = [word.partition("=") for word in words]
                self.model.set_value_heads({head: _number(f"/heads {head}", weight) for head, _, weight in pairs})
            for head in self.model.value_heads:
                typer.echo(f"{head}={self.model.value_head_weights.get(head, 0.0):g}")
        elif name == "trace" and len(words) <= 1:
            self.trace(Path(words[0] if words else "trace.html"))
        elif name == "clear" and not words:
            self.messages = []
            typer.echo("What was said is forgotten.")
        elif name == "history" and not words:
            for message in self.messages:
                typer.echo(f"{message['role']}: {message['content']}")
        else:
            if name != "help":
                typer.echo(f"There is no {line}.")
            typer.echo(HELP)

    def trace(self, output: Path) -> None:
        """Write the page of [`trace`] for the last answer, whatever has been set since."""
        from ..evaluation.trace.drawing import trace
        from ..evaluation.trace.page import check_trace_output, write_trace

        if self.last is None:
            raise ValueError("/trace is of the last answer, and nothing was said yet.")
        check_trace_output(output)
        asked, seed, control, weights = self.last
        found = trace(
            self.model,
            self.tokenizer,
            asked,
            control=control,
            value_heads=weights,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature if self.config.do_sample else 0.0,
            seed=seed,
            prompt_format=self.encoder.settings.prompt_format,
            chat_template_kwargs=self.encoder.settings.chat_template_kwargs,
        )
        page, _ = write_trace(found, output)
        typer.echo(f"{page}: {found.controlled.nats:.3g} nats in {len(found.controlled.tokens)} tokens")

    def say(self, text: str) -> None:
        """Answer a message, and remember both."""
        asked = [*self.messages, {"role": "user", "content": text}] if self.remembers else text
        ids = self.encode(asked)
        answer = self.answer_both(ids) if self.mode == "both" else self.answer(ids, self.mode == "on")
        self.last = asked, self.seed, self.model.control, self.model.value_head_weights
        self.seed += 1
        if self.remembers:
            self.messages = [*asked, {"role": "assistant", "content": answer}]

    def encode(self, asked: str | list[dict[str, str]]) -> list[int]:
        """What is asked as token ids; `ValueError` where the base does not know one, or no answer fits."""
        from ..collection.sampling import check_embedded

        ids = self.encoder.encode({"prompt": asked})
        self.encoder.report()
        check_embedded(self.model, self.tokenizer, ids)
        room = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and len(ids) + self.config.max_new_tokens > room:
            raise ValueError(
                f"{len(ids)} tokens and an answer of {self.config.max_new_tokens} do not fit into this base's "
                f"{room}: /clear forgets what was said."
            )
        return ids

    def answer_both(self, ids: list[int]) -> str:
        """The base's answer and the controlled one, side by side where there is room; the controlled one."""
        from .columns import Columns, ColumnStreamer, has_room

        if has_room():
            with Columns("base", "controlled") as columns:
                self.answer(ids, False, ColumnStreamer(self.tokenizer, columns, "base"))
                return self.answer(ids, True, ColumnStreamer(self.tokenizer, columns, "controlled"))
        typer.echo("base:")
        self.answer(ids, False)
        typer.echo("controlled:")
        return self.answer(ids, True)

    def answer(self, ids: list[int], controlled: bool, streamer: TextStreamer | None = None) -> str:
        """One answer, shown as it is drawn: on standard output, or by a streamer."""
        from transformers import TextStreamer

        from ..collection.rollouts import Sampler

        streamer = streamer or TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        control = self.model.control if controlled else False
        sampler = Sampler(self.model, self.tokenizer, self.config, control, streamer=streamer)
        # With the noise of the only prompt of a source, as that of a trace is.
        [(text, _, _)] = sampler.draw([ids], self.seed, [(0, 0)], None)
        return text


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} takes a number, got {text!r}.") from error


@app.command()
@with_settings(_ChatSettings, from_file=False)
def chat(
    settings: _ChatSettings,
    head: HeadArgument,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Base; default: the one the head names.")] = None,
    more: Annotated[
        list[str] | None,
        typer.Option("--value-head", help="NAME=HEAD: one more head, which /heads gives a weight. May be repeated."),
    ] = None,
    head_revision: HeadRevisionOption = None,
    method: MethodOption = None,
    step_size: StepSizeOption = None,
    max_kl: MaxKLOption = None,
    mode: Annotated[Literal["both", "on", "off"], typer.Option(help="Which answers are given at first.")] = "both",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0: greedy.")] = 0.7,
) -> None:
    """Chat with a base and its controlled self. `/help` shows what can be changed on the way.

    Example: `recontrol chat my-head --value-head polite=user/polite-head`
    """
    from ..collection.sampling import sampling_config

    named = named_heads(more or [], taken=("default",))
    changes = {"method": method, "step_size": step_size, "max_kl": max_kl}
    controlled, tokenizer = load_controlled(head, model, changes, settings, head_revision)
    for name, source in named.items():
        controlled.add_value_head(name, source, token=settings.token)
    controlled.check_same_for_all_prompts(controlled.control)
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature)
    config = sampling_config(controlled, tokenizer, sampling)
    Chat(controlled, tokenizer, settings, config, mode, settings.seed).run()
