"""The card of a head: what it steers, what it was trained on, what was measured, how to use it, what not to expect."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .._version import __version__
from ..configuration import ControlConfig, TrainingRecord, ValueHeadConfig
from ..utils.files import atomic_path
from .figures import FIGURES
from .hub import CARD_NAME, is_repo_id

# Ends a card that nobody has edited: the checksum of what stands before it.
_SEAL = re.compile(r"\n<!-- as written by hf_recontrol: (?P<checksum>[0-9a-f]{64}) -->\n$")

# An identifier of a licence on the Hub, and the line of a card's metadata that names one.
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_LICENSE_LINE = re.compile(rf"^license: *(?P<quote>['\"]?)(?P<name>{_LICENSE.pattern})(?P=quote)[ \r]*$", re.MULTILINE)

_LIMITS = """Control shifts what the model already might say. It teaches no facts, formats or languages, and
it is no filter: what the base can say, it can still say. The head knows the reward only from responses like
those that it was trained on; on other prompts, languages or lengths its predictions may mean nothing. Strong
settings please the reward instead of the reader: answers grow monotonous, then break. Read what comes out,
watch diversity and the KL divergence to the base, and judge with something other than the reward that the head
was trained on.

What steers towards a reward would, trained on its negative, steer away from it. Do not use this to make a model
deceive or harass people, or in place of the safeguards that its base needs."""

_PROMPTS = """Give prompts and draw answers as in training: through the base's chat template, if it has one, and
at the same temperature."""


def model_card(
    config: ValueHeadConfig,
    repo_id: str | None = None,
    subfolder: str = "",
    tags: list[str] | None = None,
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """
    The text of the card of a head. It states what is known and leaves out the rest.

    Args:
        config ([`ValueHeadConfig`]):
            Of the head.
        repo_id (`str`, *optional*):
            Where the head is on the Hub; by default the card is that of a local folder.
        subfolder (`str`, *optional*):
            Where in the repo.
        tags (`list[str]`, *optional*):
            Further tags.
        revision (`str`, *optional*):
            The branch, if it is not the repo's first.
        license (`str`, *optional*):
            Of the head. Nothing is said of it by default: nobody knows it.
    """
    training = config.training or TrainingRecord()
    base = config.base_model_name_or_path
    base_on_hub = base if base and is_repo_id(base) and not Path(base).exists() else None
    title = f"Value head for {base_on_hub or 'a causal language model'}"
    results = _eval_results(training)
    data = ModelCardData(
        library_name="hf-recontrol",
        pipeline_tag="text-generation",
        base_model=base_on_hub,
        base_model_relation="adapter" if base_on_hub else None,
        license=license,
        datasets=training.dataset if training.dataset and is_repo_id(training.dataset) else None,
        tags=["re-control", "value-head", *(tags or [])],
        model_name=(repo_id.split("/")[-1] if repo_id else title) if results else None,
        eval_results=results or None,
    )
    sections = [
        f"# {title}",
        _introduction(training),
        _usage(base if repo_id is None else base_on_hub, repo_id or ".", subfolder, revision, _drawn(training)),
        _bullets("## The head", _shape(config, base_on_hub)),
        _bullets("## Training data", _data(config, training)),
        _measured(training),
        _tuned(config),
        f"## Limits and misuse\n\n{_LIMITS}",
    ]
    text = "\n\n".join(section for section in sections if section)
    content = f"---\n{data.to_yaml()}\n---\n\n{text}\n\nWritten by hf_recontrol {__version__}.\n"
    return f"{content}\n<!-- as written by hf_recontrol: {_checksum(content)} -->\n"


def check_license(license: str | None) -> None:
    """Raise `ValueError` if a licence is none that a card can name."""
    if license is not None and not (isinstance(license, str) and _LICENSE.fullmatch(license)):
        raise ValueError(
            "`license` must be an identifier as the Hub has them, such as 'apache-2.0', 'mit', 'cc-by-4.0' or "
            f"'other', got {license!r}."
        )


def license_of(card: str | None) -> str | None:
    """The licence that the metadata of a card names, if there is one and it is an identifier."""
    metadata = card.split("\n---", 1)[0] if card is not None and card.startswith("---") else ""
    found = _LICENSE_LINE.search(metadata)
    return found["name"] if found else None


def card_in(folder: Path) -> str | None:
    """The text of the card in a folder, if there is one."""
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def write_card(folder: Path, card: str) -> None:
    """Write a card into `folder`, unless there is one that somebody wrote or edited."""
    present = card_in(folder)
    if present is None or is_untouched(present):
        with atomic_path(folder / CARD_NAME) as temporary:
            temporary.write_text(card, encoding="utf-8")


def is_untouched(text: str) -> bool:
    """Whether a card is word for word as this package, of whatever version, wrote it."""
    seal = _SEAL.search(text)
    return seal is not None and _checksum(text[: seal.start()]) == seal["checksum"]


def _checksum(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _known_figures(training: TrainingRecord) -> dict[str, float]:
    return {name: training.figures[name] for name in FIGURES if FIGURES[name].metric and name in training.figures}


def _eval_results(training: TrainingRecord) -> list[EvalResult]:
    count = training.figures.get("held_out_prompts")
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"Responses of the base{_control(training)}"
            + (f" to {count:.0f} held-out prompts" if count else ""),
            metric_type=FIGURES[name].metric,
            metric_name=FIGURES[name].label,
            metric_value=round(value, 4),
        )
        for name, value in _known_figures(training).items()
    ]


def _introduction(training: TrainingRecord) -> str:
    names = training.rewards
    reward = f"the reward {' + '.join(f'`{name}`' for name in names)}" if names else "the reward"
    return (
        f"A value head predicts, from a language model's hidden state, {reward} that the response will get. While\n"
        "the model generates, the hidden state is moved so that the predicted reward grows. No weight of the base\n"
        "model is changed (RE-Control, [arXiv 2406.05954](https://arxiv.org/abs/2406.05954))."
    )


def _drawn(training: TrainingRecord) -> str:
    """How responses are drawn as those that a head was trained on were, as arguments of `generate`."""
    temperature, top_k = training.temperature, training.sampling.get("top_k") or 0
    if not temperature or not isinstance(top_k, (int, float)) or not math.isfinite(top_k):
        return "max_new_tokens=48"
    return f"max_new_tokens=48, do_sample=True, temperature={temperature:g}, top_k={top_k:g}"


def _usage(base: str | None, name: str, subfolder: str, revision: str | None, drawn: str) -> str:
    # As JSON, so that no name ends its string and goes on as code.
    where = {"subfolder": subfolder, "revision": revision}
    options = "".join(f", {key}={json.dumps(value)}" for key, value in where.items() if value)
    source = json.dumps(name) + options
    if base is None:
        return f"""## Use

The head does not name a base model on the Hub. With the base as `model` and its `tokenizer`:

```python
from hf_recontrol import ReControlForCausalLM, ValueHead

model = ReControlForCausalLM.from_model(model, ValueHead.from_pretrained({source}))
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, {drawn})[0]))
```

{_PROMPTS}"""
    text = f"""## Use

`pip install hf_recontrol`, then{" in this folder" if name == "." else ""}:

```python
from transformers import AutoTokenizer
from hf_recontrol import ReControlForCausalLM

model = ReControlForCausalLM.from_pretrained({source})
tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
inputs = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, {drawn})[0]))
```

`control=False` gives the base, bit for bit; `control=ControlConfig(...)` other settings for one call.

{_PROMPTS}"""
    if name == "." or subfolder:
        return text
    return (
        f"{text} With transformers alone, and the base as `model`:\n\n```python\n"
        f"model.generate(**inputs, custom_generate={source}, trust_remote_code=True)\n```"
    )


def _bullets(heading: str, lines: list[str]) -> str:
    return f"{heading}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def _shape(config: ValueHeadConfig, base: str | None) -> list[str]:
    lines = []
    if base is not None:
        revision = f" at revision `{config.base_model_revision}`" if config.base_model_revision else ""
        lines.append(f"Base model: `{base}`{revision}. Its weights are not in this repo.")
    where = (
        "the input of the LM head (after the final norm)"
        if config.hook_point == "lm_head"
        else f"the output of decoder layer {config.layer}"
    )
    widths = " - ".join(map(str, [config.hidden_size, *config.head_sizes, config.num_objectives]))
    lines.append(f"Value part V: {widths}, {config.activation}, reading {where}.")
    if config.advantage_sizes is not None:
        widths = " - ".join(map(str, [config.hidden_size, *config.advantage_sizes, config.hidden_size]))
        lines.append(f"Advantage part g: {widths}.")
    if config.static_vector:
        lines.append("A static vector b: one edit for all states.")
    if config.token_bias_size is not None:
        lines.append(
            f"A token bias c, which goes with both: one number for each of {config.token_bias_size:,} tokens."
        )
    if config.control is not None:
        lines.append(f"Recommended control: `ControlConfig({_settings(config.control)})`.")
    return lines


def _data(config: ValueHeadConfig, training: TrainingRecord) -> list[str]:
    lines = []
    means, stds = (x if isinstance(x, list) else [x] for x in (config.reward_mean, config.reward_std))
    for name, mean, std in zip(training.rewards, means, stds, strict=False):
        lines.append(f"Reward `{name}`: mean {mean:.3g}, standard deviation {std:.3g} over the training responses.")
    if training.dataset:
        lines.append(f"Prompts: the data set `{training.dataset}`.")
    if training.responses is not None:
        counts = {"prompts": training.prompts, "tokens": training.tokens, "finished responses": training.finished}
        known = ", ".join(f"{number} {what}" for what, number in counts.items() if number is not None)
        lines.append(
            f"{training.responses} responses of the base{_control(training)}{f' ({known})' if known else ''}."
        )
        if training.control:
            lines.append(_sampled_under(training.control))
    if training.sampling:
        sampling = ", ".join(f"`{key}={value!r}`" for key, value in sorted(training.sampling.items()))
        lines.append(f"Sampled with {sampling}.")
    if training.states is not None:
        stored = f", stored as {training.states_dtype}" if training.states_dtype else ""
        lines.append(f"{training.states} hidden states{stored}.")
    return lines


def _control(training: TrainingRecord) -> str:
    if not training.control:
        return ""
    rounds = training.control.get("rounds", 1)
    return " under the control of another head" if rounds == 1 else f" in {rounds} rounds under different control"


def _settings(control: ControlConfig) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in control.to_dict().items() if value is not None)


def _sampled_under(control: dict[str, Any]) -> str:
    settings = _settings(ControlConfig.from_dict(control["control"]))
    heads = ", ".join(f"{name!r}: {control['sources'].get(name)!r}" for name in control["heads"])
    several = control.get("rounds", 1) > 1
    which, place = ("The last of these controls", "their") if several else ("That control", "its")
    return (
        f"{which} was `ControlConfig({settings})`, the other head `{{{heads}}}`. This head is used in {place} place, "
        "not on top of it."
    )


def _measured(training: TrainingRecord) -> str:
    known = _known_figures(training)
    if not known:
        return ""
    count = training.figures.get("held_out_prompts")
    which = f"{count:.0f} prompts" if count else "prompts"
    rows = [f"| {FIGURES[name].label} | {value:.3f} | {FIGURES[name].meaning} |" for name, value in known.items()]
    lines = [
        f"## Measured\n\nOn {which} held out of training, which also chose the epoch.\n",
        "| | | |",
        "|---|---|---|",
        *rows,
    ]
    if training.command:
        lines.append(f"\nMeasured by `{training.command}`.")
    return "\n".join([*lines, *(f"\n**Note.** {warning}" for warning in training.warnings)])


def _tuned(config: ValueHeadConfig) -> str:
    """What was measured of the recommended control, unless it is another one by now."""
    known = config.control_figures
    if known is None or config.control is None or ControlConfig.from_dict(known["control"]) != config.control:
        return ""
    rows = []
    for name, (value, low, high) in known["figures"].items():
        ends = ["?" if end is None else f"{end:.3f}" for end in (low, high)]
        rows.append(f"| {name} | {value:.3f} | {' to '.join(ends)} |")
    return "\n".join(
        [
            "## The recommended control\n",
            f"Chosen by {known['criterion']} on {known['prompts']} prompts, of which these figures are. These prompts "
            f"chose it: on others it may be worse.{_but(known)}\n",
            "| | value | 95 % interval |",
            "|---|---|---|",
            *rows,
        ]
    )


def _but(known: dict[str, Any]) -> str:
    """What else is to be said of the prompts that a control was chosen on."""
    counted, trained_on = known.get("counted", known["prompts"]), known.get("trained_on", 0)
    said = ""
    if counted < known["prompts"]:
        said += f" Only the {counted} of them counted for which every control had numbers."
    if trained_on:
        said += f" The head was trained on {trained_on} of them."
    return said
