"""
Write docs/api.md: all that `hf_recontrol` offers, from its docstrings.

    python docs/make_api.py          # writes docs/api.md
    python docs/make_api.py --check  # fails if it is not what the docstrings say
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

import hf_recontrol

PAGE = Path(__file__).with_name("api.md")
SECTIONS = {
    "Models under control": [
        "ReControlForCausalLM",
        "ControlConfig",
        "ReControlLogitsProcessor",
        "HookPoint",
        "recontrol_engine_args",
    ],
    "Heads": ["ValueHead", "ValueHeadConfig", "TrainingRecord", "convert_checkpoint"],
    "From prompts to a head": ["fit", "embedded_model"],
    "Stages": [
        "load_prompts",
        "Prompts",
        "encode_prompt",
        "write_rollouts",
        "generate_rollouts",
        "label_rollouts",
        "score_rollouts",
        "write_states",
        "collect_states",
        "train_head",
        "train_value_head",
        "fit_advantage",
        "train_critic",
    ],
    "Comparison": ["compare", "tune", "Figure", "Rival", "Answer", "Bench"],
    "A trace": ["trace", "write_trace", "Trace", "TracedResponse", "TracedToken", "TokenChance"],
    "Judges": ["Judge", "Question", "Verdict", "write_judge_page"],
    "Rewards": ["load_reward", "ClassifierReward", "RewardFunction", "text_reward", "vader"],
    "Settings": [
        "FitSettings",
        "CompareSettings",
        "TuneSettings",
        "TraceSettings",
        "SourceSettings",
        "LoadingSettings",
        "BadRowSettings",
        "PromptSettings",
        "SeedSettings",
        "ForwardSettings",
        "SamplingSettings",
        "HookPointSettings",
        "RolloutSettings",
        "ScoringSettings",
        "LabelSettings",
        "StatesSettings",
        "TemplateSettings",
        "HeadSettings",
        "TrainingSettings",
        "ValueSettings",
        "AdvantageSettings",
        "TrainSettings",
    ],
    "Data": ["Rollout", "load_rollouts", "save_rollouts", "States", "StateStore"],
    "Training": ["ValueTrainer", "td_targets", "value_differences", "split_by_prompt"],
    "Metrics": [
        "measure_value_head",
        "value_figures",
        "diversity",
        "kl_divergence",
        "match_kl",
        "KLMatch",
        "data_curve",
        "DataCurve",
        "paired_interval",
        "recommend_control",
        "Recommendation",
        "Trial",
        "write_report",
    ],
}


def signature(name: str, thing) -> str:
    """How to call it."""
    try:
        # Annotations are kept as texts, whose quotes say nothing.
        return name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))
    except (TypeError, ValueError):
        return name


def docstring(thing) -> str:
    """Its docstring as Markdown: argument lists keep their lines, links to our own names lose their brackets."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", text)
    lines, listed, code = [], False, False
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        if not code and re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            lines += [f"**{line[:-1]}**", ""]
            listed = True
        elif (
            not code and listed and line.startswith("    ") and not line.startswith("        ") and line.endswith(":")
        ):
            lines.append(f"- {line.strip()[:-1]}  ")
        elif not code and listed and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            listed = listed and not line.strip()
            lines.append(line)
    return "\n".join(lines)


def settings_docstring(thing) -> str:
    """The docstring of settings, with those that the class itself adds; the others are with the class they are of."""
    lines = docstring(thing).splitlines()
    own = inspect.get_annotations(thing)
    kept, wanted = [], True
    for line in lines:
        if match := re.match(r"- (\w+)  ?$", line + " "):
            wanted = match[1] in own
        if wanted or not line.startswith(("- ", "  ")):
            kept.append(line)
    bases = [base.__name__ for base in thing.__bases__ if base.__name__ != "Settings"]
    shown = [name for name in bases if name in SECTIONS["Settings"]]
    if shown:
        kept += ["", "Also those of " + ", ".join(f"[`{name}`](#{name.lower()})" for name in shown) + "."]
    return "\n".join(line for line in kept if own or line != "**Args**")


def methods(thing) -> list[tuple[str, object]]:
    """Public methods and properties that the package itself defines, its mixins included."""
    found = {}
    for cls in reversed(thing.__mro__):
        if not cls.__module__.startswith("hf_recontrol"):
            continue
        for name, value in vars(cls).items():
            if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, (classmethod, property))):
                found[name] = value
    if issubclass(thing, hf_recontrol.ReControlForCausalLM):
        return list(found.items())
    return [(name, value) for name, value in found.items() if inspect.getdoc(getattr(value, "fget", value))]


def entry(name: str) -> str:
    """The section of one public name."""
    thing = getattr(hf_recontrol, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"### {name}\n\n`{thing}`"
    is_settings = name.endswith("Settings")
    shown = (
        name if inspect.isclass(thing) and (is_settings or name == "ReControlForCausalLM") else signature(name, thing)
    )
    text = settings_docstring(thing) if is_settings else docstring(thing)
    parts = [f"### {name}", f"```python\n{textwrap.fill(shown, 110, subsequent_indent='    ')}\n```", text]
    if inspect.isclass(thing) and not is_settings:
        for method, value in methods(thing):
            function = value.fget if isinstance(value, property) else getattr(thing, method)
            label = method if isinstance(value, property) else signature(method, function)
            text = docstring(function)
            if text:
                parts.append(f"**`{textwrap.shorten(label, 200)}`**\n\n{text}")
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    listed = [name for names in SECTIONS.values() for name in names]
    public = [name for name in hf_recontrol.__all__ if name != "__version__"]
    if sorted(listed) != sorted(public):
        raise SystemExit(f"Sections and public names differ: {sorted(set(listed) ^ set(public))}")
    contents = [
        f"- [{title}](#{title.lower().replace(' ', '-')}): "
        + ", ".join(f"[`{name}`](#{name.lower()})" for name in names)
        for title, names in SECTIONS.items()
    ]
    text = [
        "# API",
        "All that `hf_recontrol` offers: `from hf_recontrol import NAME`. What is not on this page is private and may "
        "change. Made from the docstrings by `python docs/make_api.py`; `help(hf_recontrol.NAME)` shows the same.",
        "\n".join(contents),
    ]
    for title, names in SECTIONS.items():
        text.append(f"## {title}")
        text += [entry(name) for name in names]
    lines = [line.rstrip() for line in "\n\n".join(text).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") != text:
            raise SystemExit("docs/api.md is not what the docstrings say: run `make docs`.")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
