"""
Settings of the stages before training: how prompts are read, responses sampled and scored, states read.

A setting has one name, one default and one text, here. The functions of `hf_recontrol` take these objects (or single
settings as keywords), the command `recontrol` makes its options from them, and a YAML file holds them under the same
names (`recontrol fit --config fit.yaml`).
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal

from ..utils.setting_fields import Settings, setting, settings_class
from .engine import OWN_ENGINE, EngineSettings


@settings_class("Base model")
class SourceSettings(Settings):
    """Where the files of a base that is named, not given, are got."""

    revision: str | None = setting(
        None,
        "Branch, tag or commit of the base's repo.",
        default_text="the one that the head names, else the main branch",
    )
    trust_remote_code: bool = setting(
        False, "Run the code in the base's repo, for models that transformers does not know. Read it first."
    )
    token: str | None = setting(
        None,
        "Token of the Hub, for a base that is private or gated. Others on this machine may see it on a command line, "
        "not in the variable HF_TOKEN. It is never written to a file.",
        secret=True,
        default_text="HF_TOKEN, else that of `hf auth login`",
    )


@settings_class("Base model")
class LoadingSettings(SourceSettings):
    """How a base model that is named, not given, is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "Dtype of the base's weights; `auto`: that of its files. Use float32 on a CPU that is slow in bfloat16.",
    )
    device: str | None = setting(
        None,
        "Where the base computes: cpu, cuda:1, ...",
        default_text="this process's accelerator, else the CPU",
    )
    device_map: str | None = setting(
        None,
        "How a base that fits on no single device is spread, instead of `device`: auto, balanced, ... (needs "
        "accelerate).",
        default_text="it is on one device",
    )
    quantization_config: dict | None = setting(
        None,
        'Quantises the base as it is loaded, such as {"quant_method": "bitsandbytes", "load_in_4bit": true}; in '
        "Python also a configuration of transformers. Every use of the head should name the same.",
        default_text="as its files are",
    )

    def __post_init__(self):
        if hasattr(self.quantization_config, "to_dict"):
            object.__setattr__(self, "quantization_config", self.quantization_config.to_dict())
        super().__post_init__()
        if self.device == "auto":
            raise ValueError("`device` is one device: to spread the base, use `device_map`, got 'auto'.")
        if self.device is not None and self.device_map is not None:
            raise ValueError("`device` and `device_map` both say where the base computes: use one of them.")


@settings_class("Prompts")
class BadRowSettings(Settings):
    """What is done about rows that cannot be used."""

    on_bad_rows: Literal["error", "skip"] = setting(
        "error",
        "`error`: stop and name the rows that cannot be used (prompts that are empty, broken or too long, rewards "
        "that are no numbers). `skip`: leave them out, and say so.",
    )


@settings_class("Prompts")
class PromptSettings(BadRowSettings):
    """How prompts are read."""

    split: str = setting("train", "Split of a dataset.")
    config_name: str | None = setting(None, "Configuration of a dataset that has several.")
    prompt_column: str = setting(
        "prompt",
        "Column that holds the prompts. Where none is named and there is no `prompt`, `messages` is taken. The last "
        "answer of a conversation in any column but `prompt` is removed and asked for anew.",
    )
    on_answers: Literal["error", "cut", "keep"] = setting(
        "error",
        "Prompts that end with their answer, behind the last `\\n\\nAssistant:` of a dialogue written as text (as in "
        "HH-RLHF's `chosen`) or in the assistant's turn. `cut`: ask for the answer anew. `keep`: the model goes on "
        "with a text; chats cannot be gone on with.",
    )
    limit: int | None = setting(None, "Rows to read at most: for a first try.", low=1, default_text="all")
    streaming: bool = setting(False, "Read a dataset of the Hub as it comes, instead of downloading all of it first.")


@settings_class("Prompts")
class TemplateSettings(Settings):
    """How prompts are formatted for the model."""

    prompt_format: Literal["auto", "plain", "formatted"] = setting(
        "auto",
        "`plain`: texts are the user's messages, and special tokens that texts or messages mention are ordinary text. "
        "`formatted`: texts are in the model's format and taken as they are, and special tokens act as such. `auto`: "
        "a text that begins and goes on as the chat template does is formatted, all else is plain; without a chat "
        "template, all as the tokenizer does.",
    )
    chat_template_kwargs: dict = setting(
        {},
        "Arguments of the chat template for all prompts, such as enable_thinking. Those in a row's own "
        "`chat_template_kwargs` column override them.",
        default_text="none",
    )

    def __post_init__(self):
        super().__post_init__()
        try:
            json.dumps(self.chat_template_kwargs, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"`chat_template_kwargs` must hold what JSON can hold ({error}).") from error


@settings_class("Base model")
class ForwardSettings(Settings):
    """How much goes through the base at once."""

    batch_size: int = setting(
        16,
        "Sequences in one forward of the base. Raise it as far as memory allows; results do not depend on it.",
        low=1,
    )


@settings_class("Sampling")
class SeedSettings(Settings):
    """Chance."""

    seed: int = setting(
        0,
        "Seed of everything random: the same settings and seed give the same responses and the same head, on the same "
        "kind of device (a CPU and an accelerator draw different noise).",
        low=0,
        high=2**32 - 1,
    )


@settings_class("Base model")
class DemoSettings(SeedSettings, PromptSettings, LoadingSettings):
    """What the demo can be told of its base, its prompts and chance."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "float32", "Dtype of the base's weights; `auto`: that of its files."
    )


@settings_class("Sampling")
class StopSettings(Settings):
    """Where a response ends, beside the model's own end tokens."""

    stop_strings: tuple[str, ...] = setting(
        (),
        "Texts that end a turn, such as `\\n\\nHuman:` for a pretrained-only model that is prompted with dialogues.",
        escapes=True,
    )


@settings_class("Sampling")
class SamplingSettings(SeedSettings, ForwardSettings, TemplateSettings, StopSettings):
    """How responses are drawn."""

    num_samples: int = setting(
        1,
        "Responses for each prompt. With two or more, V can be compared with the mean reward of a prompt; new prompts "
        "teach more than further responses to old ones.",
        low=1,
    )
    max_prompt_tokens: int | None = setting(
        None,
        "A prompt of more tokens cannot be used, see `on_bad_rows`: one that is far longer than all others decides "
        "how much memory its batch takes.",
        low=1,
        default_text="as many as the model has room for",
    )
    max_new_tokens: int | None = setting(
        None,
        "Tokens drawn at most for each response. Take the length that the head will be used at.",
        low=1,
        default_text="the generation config's, else 128",
    )
    temperature: float | None = setting(
        None,
        "Sampling temperature; 0 is greedy. Stay near 1: the responses must differ for a head to learn which are "
        "better.",
        low=0,
        default_text="the generation config's, else 1",
    )
    top_p: float | None = setting(
        None,
        "Nucleus sampling: draw only from the likeliest tokens that together have this probability. The advantage "
        "part is fitted to the whole distribution: leave it out for that.",
        low=0,
        high=1,
        default_text="the generation config's, else the whole distribution",
    )
    generation_config: Any = setting(
        None,
        "All other settings of sampling, greedy or beam search: a folder or Hub name with a generation_config.json "
        "(in Python also a GenerationConfig). The base's own generation config is not used.",
        default_text="sample from the whole distribution",
    )

    def __post_init__(self):
        super().__post_init__()
        config = self.generation_config
        if not (config is None or isinstance(config, (str, os.PathLike)) or hasattr(config, "get_generation_mode")):
            raise TypeError(f"`generation_config` must be a GenerationConfig or its name, got {config!r}.")


@settings_class("States")
class HookPointSettings(ForwardSettings):
    """Where the head reads and edits the state."""

    hook_point: Literal["lm_head", "decoder_layer"] = setting(
        "lm_head",
        "Where the head reads the state: `lm_head`, the LM head's input, which the advantage part needs; or "
        "`decoder_layer`, the output of a decoder layer.",
    )
    layer: int = setting(
        -1,
        "Which decoder layer, at `decoder_layer`; negative from the end. Only the last one edits no key-value cache.",
    )
    directions: bool = setting(
        True,
        "At `lm_head`: also keep the directions w_y - w̄, as many bytes again, which the static vector and g are "
        "trained on. Turn it off for a head with V alone.",
    )

    @property
    def with_directions(self) -> bool:
        """Whether directions are kept: `directions`, at the only hook point that has them."""
        return self.directions and self.hook_point == "lm_head"


@settings_class("Sampling")
class RolloutSettings(HookPointSettings, SamplingSettings, EngineSettings, BadRowSettings):
    """How responses are sampled into a folder."""

    part_size: int = setting(256, "Responses in one file: what a stop can cost each process.", low=1)
    keep_states: bool = setting(
        False,
        "Keep the states while sampling instead of reading them afterwards: faster on a CPU, more on the disk. Not "
        "for beam search.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.keep_states and self.engine != OWN_ENGINE:
            raise ValueError("`keep_states` needs `engine='transformers'`: other engines do not show their states.")


@settings_class("Rewards")
class ScoringSettings(BadRowSettings):
    """How rewards are put together."""

    combine_rewards: Literal["none", "mean", "sum"] = setting(
        "none",
        "`none`: each reward is an objective of its own, and a response that one of them does not score (it returns "
        "None) is left out. `mean`, `sum`: the rewards that score a response make one reward: for functions that each "
        "score only their own kind of prompt.",
    )


@settings_class("Rewards")
class LabelSettings(ScoringSettings):
    """How responses are scored."""

    prefix_every: int | None = setting(
        None,
        "Also score the response so far after every k-th token, for the critic: a static vector and g learn far more "
        "from as many responses. It takes a reward that says something of half a sentence, and length / k more of its "
        "calls. 8 is a good first try. A column beside such a reward gives its one number to every part.",
        low=1,
        default_text="whole responses alone",
    )


@settings_class("States")
class StatesSettings(HookPointSettings):
    """How states are read and stored."""

    states_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = setting(
        "auto", "Dtype of stored states; `auto`: that of the base. int8 halves bfloat16 and reports its error."
    )
    critic_layer: int | None = setting(
        None,
        "Decoder layer (negative: from the end) whose states are stored too, for a critic: a value function that sees "
        "more than the head can, and exists in training alone. A middle one is a good first try.",
        default_text="the critic reads no other layer",
    )
    every: int = setting(
        1,
        "Keep every k-th state, counted back from the last one, to save disk: neighbours say nearly the same to V. "
        "The static vector and the advantage part lose by it, as a token is then held against what k tokens changed.",
        low=1,
    )
    max_gigabytes: float | None = setting(
        None,
        "Keep as many states as fit into so many 10⁹ bytes: every k-th, which costs the static vector and the "
        "advantage part what `every` says.",
        above=0,
        default_text="no limit",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.critic_layer is not None and not self.with_directions:
            raise ValueError(
                "`critic_layer` is for the static vector and the advantage part, which need `hook_point='lm_head'` "
                "and `directions`."
            )
