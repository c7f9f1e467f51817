"""One HTML page on a trained head: what it was trained on, how good it is, and examples to look at."""

from __future__ import annotations

import io
import json
import math
import os
import re
from html import escape
from numbers import Integral, Real

from ...data.templating import message_text
from ...heads.figures import FIGURES
from ...utils.extras import needs_extra
from .document import HIGH, LOW, OPACITY, facts_list, html_page, write_page

_READING = {
    "value": (
        "The loss is that of the training responses, the error that of held-out ones, relative to always guessing the "
        "training mean reward (dashed). Good: both fall and level off, the error well below 1. Bad: the error stays "
        "near 1 (nothing was learned), or rises while the loss falls (overfitting: more prompts or fewer epochs help)."
    ),
    "advantage": (
        "g predicts how much each token changes the critic's value (V's own, if there is no critic), less what the "
        "state alone explains. Its error is relative to always guessing no change (dashed). Most of the change is "
        "chance, so even a good g stays near 1. Good: the error lies below 1 and falls or stays flat. Bad: it lies "
        "above 1, or rises while the loss falls (overfitting)."
    ),
    "position": (
        "How well V foresees the final reward after a share of a held-out response. Good: the error starts near that "
        "of the prompt's mean reward or below it and falls, the correlation rises towards 1. Bad: flat curves, or an "
        "error above 1, which is worse than a constant. A correlation that is high from the start comes from the "
        "prompt alone, and control cannot change the prompt."
    ),
    "calibration": (
        "Held-out responses grouped by what V predicts at the last token; larger points hold more responses. Good: "
        "points along the dashed diagonal, spread over a wide range. Bad: a flat row (V tells responses apart that "
        "earn the same), a steep one (V is too timid), or all points in one place."
    ),
    "examples": (
        "A token's colour shows V once it was read, blue below the training mean reward and red above; point at it "
        "for the number. Good: the colour turns where the text does, and the last one agrees with the reward."
    ),
}

_STYLE = """
body{max-width:62rem}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
.warnings,.plot{border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:1rem 0}
.warnings{background:var(--warn);border-color:#b08800}.warnings ul{margin:.25rem 0 0;padding-left:1.25rem}
.plot{background:#fff;padding:.5rem;text-align:center}
.plot svg{max-width:100%;height:auto}
.role{font-size:.8rem;margin-top:.6rem}.role:first-child{margin-top:0}
table{border-collapse:collapse;width:100%}thead th{font-weight:600}
th,td{text-align:left;font-weight:normal;padding:.3rem 1.5rem .3rem 0;border-bottom:1px solid var(--line)}
.text span{border-radius:.15rem}
.scores{margin-top:.75rem;padding-top:.5rem;border-top:1px solid var(--line)}
.scores span{margin-right:1.5rem}
.scale{display:inline-block;width:9rem;height:.8rem;margin:0 .5rem;border-radius:.2rem}
"""


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    facts: dict[str, str],
    figures: dict,
    curves: dict[str, list[dict]],
    examples: list[dict],
) -> None:
    """
    Write one HTML page that needs no other file: facts, learning curves, held-out figures and examples. What the data
    lack is left out, and a figure that is `None` or NaN is shown as "-".

    Args:
        path (`str` or `os.PathLike`):
            The page; missing folders are created, and an older page stays as it is until the new one is complete.
        title (`str`):
            The page's heading.
        facts (`dict[str, str]`):
            Labels and texts for the top of the page, in their order.
        figures (`dict`):
            Of held-out responses: `held_out_episodes`, `held_out_prompts`, `value_error`, `value_error_last`,
            `correlation_first`, `correlation_last`, `advantage_correlation`, `constant_correlation`; `baselines`
            (errors `"constant"` and `"prompt_mean"`); `by_position` (dicts of `"position"`, `"error"` and
            `"correlation"`); `calibration` (dicts of `"predicted"`, `"realised"` and `"count"`); `reward_mean`, the
            middle of the tokens' colours; and `warnings` in plain words.
        curves (`dict[str, list[dict]]`):
            The `log_history` of a [`~transformers.Trainer`] for `"value"` and `"advantage"`, with the held-out errors
            under `eval_value_error` and `eval_advantage_error`.
        examples (`list[dict]`):
            Dicts of `"prompt"`, `"completion"`, `"reward"`, `"predicted"` and `"finished"`, and of V token by token
            in `"tokens"` and `"values"` where it is to be shown.

    Raises:
        `ImportError`: if `matplotlib` is not installed; names the extra. `ValueError`: if an example has not one value
        for each token.
    """
    with needs_extra("train", "The report"):
        import matplotlib.figure  # noqa: F401
    content = [
        _warnings(figures.get("warnings") or []),
        facts_list(facts),
        _section("Learning V", "value", _learning(curves.get("value") or [], "value")),
        _section("Learning g", "advantage", _learning(curves.get("advantage") or [], "advantage")),
        _section("Along the response", "position", _by_position(figures)),
        _section("Predicted and realised reward", "calibration", _calibration(figures.get("calibration") or [])),
        _section("Figures", None, _table(figures)),
        _section("Examples", "examples", _examples(examples, figures.get("reward_mean") or 0.0)),
    ]
    write_page(path, html_page(title, _STYLE, content))


def _section(heading: str, reading: str | None, content: str) -> str:
    if not content:
        return ""
    text = f'<p class="note"><strong>How to read this.</strong> {_READING[reading]}</p>\n' if reading else ""
    return f"<section>\n<h2>{heading}</h2>\n{text}{content}\n</section>"


def _warnings(warnings: list[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<section class="warnings"><strong>Warning</strong><ul>{items}</ul></section>' if items else ""


def _table(figures: dict) -> str:
    known = figures | (figures.get("baselines") or {})
    rows = "".join(
        f'<tr><th scope="row">{figure.label}</th><td>{_number(known[name])}</td>'
        f'<td class="note">{figure.meaning}</td></tr>\n'
        for name, figure in FIGURES.items()
        if name in known
    )
    head = '<thead><tr><th scope="col">Figure</th><th scope="col">Value</th><th scope="col">Meaning</th></tr></thead>'
    return f"<table>\n{head}\n<tbody>\n{rows}</tbody>\n</table>" if rows else ""


def _number(value: Real | list | None) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_number(each) for each in value)
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,}" if isinstance(value, Integral) else f"{value:.3g}"


def _points(rows: list[dict], *keys: str) -> list[tuple[float, ...]]:
    """The rows that hold a finite number under each key, sorted."""
    found = ([row.get(key) for key in keys] for row in rows)
    return sorted(tuple(map(float, p)) for p in found if all(isinstance(x, Real) and math.isfinite(x) for x in p))


def _panels(count: int):
    # Never pyplot: it keeps figures and a backend for the whole process, which belong to the user.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * count, 3.3), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, panels


def _draw(panel, points: list[tuple[float, float]], color: str, xlabel: str, ylabel: str) -> None:
    panel.plot(*zip(*points, strict=True), color=color, marker="." if len(points) < 40 else None)
    panel.set(xlabel=xlabel, ylabel=ylabel)


def _svg(figure, name: str, label: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue().decode("utf-8")
    # Every figure numbers its parts and glyphs alike, or at random; on one page they must differ, on each run agree.
    ids: dict[str, str] = {}
    svg = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda m: m[1] + ids.setdefault(m[2], f"{name}-{len(ids)}"), svg)
    attributes, content = svg[svg.index("<svg ") + 5 :].split(">", 1)
    start = f'<svg role="img" aria-label="{label}" {attributes}><title>{label}</title>'
    return f'<div class="plot">{start}{content.rstrip()}</div>'


def _learning(rows: list[dict], part: str) -> str:
    loss, error = _points(rows, "epoch", "loss"), _points(rows, "epoch", f"eval_{part}_error")
    if not loss and not error:
        return ""
    figure, panels = _panels(bool(loss) + bool(error))
    if loss:
        _draw(panels[0], loss, "tab:blue", "epoch", "training loss")
    if error:
        _draw(panels[-1], error, "tab:red", "epoch", "held-out error")
        panels[-1].axhline(1.0, color="grey", linestyle="--")
    return _svg(figure, f"learning-{part}", f"Learning curves of {'V' if part == 'value' else 'g'} by epoch")


def _by_position(figures: dict) -> str:
    rows = figures.get("by_position") or []
    error, correlation = _points(rows, "position", "error"), _points(rows, "position", "correlation")
    if not error and not correlation:
        return ""
    figure, panels = _panels(bool(error) + bool(correlation))
    if error:
        _draw(panels[0], error, "tab:red", "share of the response", "error of V")
        lines = (("constant", "training mean reward", "grey"), ("prompt_mean", "prompt's mean reward", "tab:green"))
        for key, label, color in lines:
            for (level,) in _points([figures.get("baselines") or {}], key):
                panels[0].axhline(level, color=color, linestyle="--", label=label)
        panels[0].set_ylim(bottom=0)
        if panels[0].get_legend_handles_labels()[1]:
            panels[0].legend(fontsize="small")
    if correlation:
        _draw(panels[-1], correlation, "tab:blue", "share of the response", "correlation with the final reward")
        panels[-1].set_ylim(min(0.0, *(y for _, y in correlation)) * 1.05, 1.05)
    return _svg(figure, "position", "How well V foresees the reward, by position in the response")


def _calibration(bins: list[dict]) -> str:
    points = _points(bins, "predicted", "realised", "count")
    if not points:
        return ""
    predicted, realised, counts = zip(*points, strict=True)
    figure, (panel,) = _panels(1)
    ends = [min(predicted + realised), max(predicted + realised)]
    panel.plot(ends, ends, color="grey", linestyle="--")
    panel.scatter(predicted, realised, s=[20 + 180 * n / max(1, *counts) for n in counts], alpha=0.7, color="tab:blue")
    panel.set(xlabel="reward predicted by V", ylabel="mean reward realised")
    return _svg(figure, "calibration", "Realised reward against the reward that V predicts at the last token")


def _examples(examples: list[dict], middle: float) -> str:
    shown = [value for example in examples if example.get("tokens") for value in example.get("values") or []]
    reach = max((abs(value - middle) for value in shown if math.isfinite(value)), default=0.0)
    cards = "\n".join(_example(number, example, middle, reach) for number, example in enumerate(examples))
    if not reach:
        return cards
    stops = f"rgba({LOW},{OPACITY}),transparent,rgba({HIGH},{OPACITY})"
    bar = f'<span class="scale" style="background:linear-gradient(to right,{stops})"></span>'
    return f'<p class="note">{_number(middle - reach)}{bar}{_number(middle + reach)}</p>\n{cards}'


def _example(number: int, example: dict, middle: float, reach: float) -> str:
    prompt, tokens, values = example["prompt"], example.get("tokens"), example.get("values")
    chat = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    parts = [(str(message["role"]), escape(_said(message))) for message in chat]
    response = escape(example["completion"])
    if tokens is not None and values is not None:
        if len(tokens) != len(values):
            raise ValueError(f"`examples[{number}]` has {len(tokens)} tokens and {len(values)} values: give as many.")
        response = "".join(_token(t, v, middle, reach) for t, v in zip(tokens, values, strict=True))
    texts = "".join(
        f'<div class="role">{escape(role)}</div><div class="text" dir="auto">{text}</div>\n'
        for role, text in [*parts, ("response", response)]
    )
    cut = "" if example.get("finished", True) else '<span class="note">cut off at the length limit</span>'
    return (
        f'<article class="card">\n{texts}<div class="scores"><span>reward {_number(example.get("reward"))}</span>'
        f"<span>predicted {_number(example.get('predicted'))}</span>{cut}</div>\n</article>"
    )


def _said(message: dict) -> str:
    """A message's text, and as JSON what else it holds, such as calls of tools."""
    text = message_text(message)
    more = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    return "\n".join([*([text] if text else []), *([json.dumps(more, ensure_ascii=False)] if more else [])])


def _token(token: str, value: float, middle: float, reach: float) -> str:
    share = (value - middle) / reach if reach and math.isfinite(value) else 0.0
    color = f"rgba({HIGH if share > 0 else LOW},{abs(share) * OPACITY:.2f})"
    return f'<span title="{_number(value)}" style="background:{color}">{escape(token)}</span>'
