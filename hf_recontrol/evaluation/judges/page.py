"""A page on which a person judges pairs of answers: one HTML file that tells nothing of who wrote which."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...utils.checks import check_int
from ...utils.extras import needs_extra
from ...utils.files import check_target, read_json, write_json
from ..comparison.results import ANSWERS_NAME, FIGURES_JSON_NAME
from ..pages.document import html_page, write_page
from .judge import shown_prompt
from .person import KEY_NAME, digest_of

_STYLE = """
body{max-width:72rem}
h2{font-size:1rem;margin:0 0 .5rem;color:var(--dim)}
.answers{display:grid;grid-template-columns:1fr 1fr;gap:1rem}.answers .card{margin:0 0 1rem}
@media (max-width:44rem){.answers{grid-template-columns:1fr}}
.choices,.moves{display:flex;flex-wrap:wrap;gap:.75rem;margin:0 0 1rem}
button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.5rem 1rem;cursor:pointer}
button:focus-visible{outline:3px solid var(--mark);outline-offset:2px}
button[aria-pressed=true]{border-color:var(--mark);box-shadow:inset 0 0 0 1px var(--mark)}
kbd{font:.8rem ui-monospace,monospace;border:1px solid var(--line);border-radius:.25rem;padding:0 .3rem}
"""

_SCRIPT = """
"use strict";
const page = document.body.dataset.page;
const pairs = Array.from(document.querySelectorAll("article"));
const place = "recontrol-judge-" + page;
const choices = {"1": "left", "2": "right", "0": "tie"};
let verdicts = {};
let shown = 0;
try {
  const kept = JSON.parse(localStorage.getItem(place));
  for (const pair of pairs) {
    if (kept && Object.values(choices).includes(kept[pair.id])) verdicts[pair.id] = kept[pair.id];
  }
} catch (error) { /* nothing is kept: a browser may forbid it */ }
const said = document.getElementById("said");
function show(number) {
  shown = Math.min(Math.max(number, 0), pairs.length - 1);
  pairs.forEach((pair, i) => { pair.hidden = i !== shown; });
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.setAttribute("aria-pressed", String(verdicts[pairs[shown].id] === button.dataset.choice));
  }
  const done = Object.keys(verdicts).length;
  said.textContent = `Pair ${shown + 1} of ${pairs.length}. ${done} judged.`;
}
function choose(choice) {
  verdicts[pairs[shown].id] = choice;
  try { localStorage.setItem(place, JSON.stringify(verdicts)); } catch (error) { /* the file can still be saved */ }
  const next = pairs.findIndex((pair, i) => i > shown && !(pair.id in verdicts));
  show(next < 0 ? shown : next);
}
function exported() {
  return JSON.stringify({kind: "hf_recontrol verdicts", page: page, verdicts: verdicts}, null, 2) + "\\n";
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported()], {type: "application/json"}));
  link.download = "verdicts-" + page + ".json";
  link.click();
}
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
document.getElementById("back").addEventListener("click", () => show(shown - 1));
document.getElementById("on").addEventListener("click", () => show(shown + 1));
document.getElementById("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  // A key that is held down judges one pair.
  if (event.key in choices) { if (!event.repeat) choose(choices[event.key]); }
  else if (event.key === "ArrowLeft") show(shown - 1);
  else if (event.key === "ArrowRight") show(shown + 1);
  else return;
  event.preventDefault();
});
document.getElementById("tool").hidden = false;
show(Math.max(0, pairs.findIndex((pair) => !(pair.id in verdicts))));
"""

_TOOL = """<div id="tool" hidden>
<p class="note" id="said" role="status" aria-live="polite"></p>
<div class="choices">
<button type="button" data-choice="left"><kbd>1</kbd> Left is better</button>
<button type="button" data-choice="tie"><kbd>0</kbd> Equally good</button>
<button type="button" data-choice="right"><kbd>2</kbd> Right is better</button>
</div>
<div class="moves">
<button type="button" id="back"><kbd>←</kbd> Back</button>
<button type="button" id="on"><kbd>→</kbd> On</button>
<button type="button" id="save">Save verdicts</button>
</div>
</div>
<noscript><p class="card">This page needs JavaScript, which is switched off in this browser.</p></noscript>"""


def write_judge_page(
    comparison: str | os.PathLike,
    control: str,
    output: str | os.PathLike,
    *,
    strength: float | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
) -> int:
    """
    Write a page on which a person says which of two answers is better: a control's, or that of the one that the
    comparison is against. Which is which, on which side, is in the comparison's folder alone, so that the page tells
    nothing. `judge: {kind: person, verdicts: FILE}` of [`compare`] reads the file that the page saves.

    Args:
        comparison (`str` or `os.PathLike`):
            The folder of a finished comparison.
        control (`str`):
            The control's name there.
        output (`str` or `os.PathLike`):
            The page, one HTML file.
        strength (`float`, *optional*):
            Which of its strengths, if it has several.
        num_prompts (`int`, *optional*):
            How many prompts, at random. By default all.
        seed (`int`, *optional*, defaults to 0):
            Of the prompts, their order and the sides.

    Returns:
        `int`: pairs on the page. Answers that are the same are no pair: they tie.

    Raises:
        `OSError`, `ValueError`: if there is no such comparison, control or strength; if no two answers differ.
    """
    check_target(output)
    check_int("seed", seed, low=0)
    if num_prompts is not None:
        check_int("num_prompts", num_prompts, low=1)
    comparison = Path(comparison)
    against, own, others, strength = _answers(comparison, control, strength)
    numbers = sorted(own)
    secret = json.dumps([seed, control, strength, [digest_of(*own[n][:2], others[n][1]) for n in numbers]])
    chance = random.Random(secret)
    if num_prompts is not None and num_prompts < len(numbers):
        numbers = chance.sample(numbers, num_prompts)
    chance.shuffle(numbers)
    page = hashlib.sha256(f"{secret} {num_prompts}".encode("utf-8", "surrogatepass")).hexdigest()[:12]
    pairs, articles = {}, []
    for number in numbers:
        prompt, answer = own[number]
        other, is_left = others[number][1], chance.random() < 0.5
        pair = {"prompt_number": number, "digest": digest_of(prompt, answer, other)}
        if answer == other:
            pairs[f"same{number}"] = pair | {"side": None}
            continue
        name = f"pair{len(articles) + 1}"
        pairs[name] = pair | {"side": "left" if is_left else "right"}
        articles.append(_article(name, prompt, *((answer, other) if is_left else (other, answer))))
    if not articles:
        raise ValueError(f"Every answer of {control!r} is the same as that of {against!r}: there is nothing to judge.")
    key = {"page": page, "control": control, "strength": strength, "against": against, "seed": seed, "pairs": pairs}
    write_json(comparison / KEY_NAME.format(page), key)
    write_page(output, _html(page, articles))
    return len(articles)


def _answers(
    comparison: Path, control: str, strength: float | None
) -> tuple[str, dict[int, tuple[str, str]], dict[int, tuple[str, str]], float | None]:
    """(the control compared against; its answers and those of the control: by prompt prompt and answer; strength)"""
    with needs_extra("compare", "Reading answers"):
        import pyarrow.parquet as parquet
    path = comparison / ANSWERS_NAME
    if not path.is_file() or not (comparison / FIGURES_JSON_NAME).is_file():
        raise OSError(f"{comparison} holds no finished comparison: make it with `recontrol compare`.")
    about = read_json(comparison / FIGURES_JSON_NAME)
    against = about["against"]
    rows = [(row["name"], row["strength"], row["kind"]) for row in about["controls"]]
    pools = {name for name, _, kind in rows if kind == "best_of_n"}
    if pools & {control, against}:
        raise ValueError("A best of n has several answers to each prompt: a person judges one of another control.")
    others = [name for name in dict.fromkeys(name for name, *_ in rows) if name not in pools | {against}]
    if not others:
        raise ValueError(f"{comparison} compares no control with {against!r} that a person can judge.")
    if control not in others:
        raise ValueError(
            f"`control` must be one of {', '.join(map(repr, others))}, which are compared with {against!r}, got "
            f"{control!r}."
        )
    strengths = [own for name, own, _ in rows if name == control]
    fits = strengths
    if strength is not None:
        # Tables show six digits of a strength that was found.
        fits = [own for own in strengths if own is not None and math.isclose(own, strength, rel_tol=1e-5)]
    if len(fits) != 1:
        known = ", ".join(f"{own:g}" for own in strengths if own is not None) or "none"
        raise ValueError(f"Strengths of the control {control!r}: {known}. Name one of them (`strength`).")
    (strength,) = fits
    lines = parquet.read_table(
        path, columns=["control", "strength", "prompt", "prompt_number", "sample", "completion"]
    ).to_pylist()
    found = [
        {
            line["prompt_number"]: (line["prompt"], line["completion"])
            for line in lines
            if line["control"] == name and line["sample"] == 0 and (name == against or line["strength"] == strength)
        }
        for name in (control, against)
    ]
    return against, *found, strength


def _article(name: str, prompt: str, left: str, right: str) -> str:
    answers = "".join(
        f'<section class="card"><h2>{side}</h2><div class="text" dir="auto">{escape(text)}</div></section>'
        for side, text in (("Left", left), ("Right", right))
    )
    said = (
        f'<section class="card"><h2>Request</h2><div class="text" dir="auto">{escape(_said(prompt))}</div></section>'
    )
    return f'<article id="{name}" hidden>\n{said}\n<div class="answers">{answers}</div>\n</article>'


def _said(written: str) -> str:
    """A prompt as the table of answers has it, for a reader."""
    try:
        prompt = json.loads(written)
        is_chat = isinstance(prompt, list) and prompt and all("role" in message for message in prompt)
        return shown_prompt(prompt) if is_chat else written
    except (ValueError, TypeError, AttributeError, RecursionError):
        return written


def _html(page: str, articles: Sequence[str]) -> str:
    note = (
        '<p class="note">Say which of the two answers to the request is better. Who wrote which is not on this page. '
        "What you said is kept in this browser; save it in the end, or in between.</p>"
    )
    return html_page(
        "Which answer is better?", _STYLE, [note, _TOOL, *articles], _SCRIPT, attributes=f'data-page="{page}"'
    )
