"""A trace as files: JSON, and one HTML page on which each token tells what control did there."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

from ...data.templating import message_text
from ...utils.files import check_target, without_place, write_json
from ..pages.document import HIGH, LOW, OPACITY, facts_list, html_page, write_page
from .record import KIND, Trace, TracedResponse
from .script import SCRIPT

_PAGE, _JSON = ".html", ".json"
_NAME = "trace"
# By which a page is known again.
_MARK = 'type="application/json" id="trace"'

_STYLE = (
    f"\n:root{{--low:{LOW};--high:{HIGH};--opacity:{OPACITY}}}"
    + """
body{max-width:84rem}
h2{font-size:1.1rem;margin:0}
.card>.text{margin:.25rem 0 0}
.sides{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem;align-items:start}
.sides .card{margin:0}
@media (max-width:52rem){.sides{grid-template-columns:minmax(0,1fr)}}
.bar{display:flex;flex-wrap:wrap;gap:.5rem 1.25rem;align-items:center;margin:1rem 0}
fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.4rem;align-items:center}
legend{float:left;padding:0;margin-right:.4rem;color:var(--dim)}
fieldset label{border:1px solid var(--line);border-radius:.5rem;padding:.2rem .7rem;
background:var(--card);cursor:pointer}
fieldset label:has(:checked){border-color:var(--mark);box-shadow:inset 0 0 0 1px var(--mark)}
fieldset label:has(:focus-visible){outline:3px solid var(--mark);outline-offset:2px}
fieldset input{position:absolute;opacity:0;pointer-events:none}
select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.2rem}
.scale{display:inline-block;width:8rem;height:.8rem;margin:0 .5rem;border-radius:.2rem;border:1px solid var(--line)}
.tokens{margin:.5rem 0;line-height:1.9;white-space:pre-wrap}
.token{border-radius:.2rem;padding:.1rem 0;cursor:default;border-bottom:2px solid transparent}
.token.other{border-bottom-color:var(--mark)}
.token.none{border:1px dotted var(--dim);padding:0 .15rem}
.token.sign{color:var(--dim)}
.token:focus,.token.near{outline:2px solid var(--mark);outline-offset:1px}
.parts{border-left:3px solid rgb(var(--high));padding-left:.15rem}
.key span{border-bottom:2px solid var(--mark)}
.key b{border-left:3px solid rgb(var(--high));padding-left:.15rem;font-weight:400}
figure{margin:.75rem 0 0}figcaption{color:var(--dim);font-size:.85rem}
.plot{display:flex;height:7rem;gap:.4rem}.plot svg{flex:1;width:0;height:100%}
.plot line,.plot polyline{vector-effect:non-scaling-stroke}
.levels{display:flex;flex-direction:column;justify-content:space-between;width:3.2rem;text-align:right;line-height:1;
white-space:nowrap;color:var(--dim);font-size:.75rem}
#tip{position:absolute;z-index:1;max-width:min(26rem,calc(100vw - 2rem));box-sizing:border-box;background:var(--card);
border:1px solid var(--line);border-radius:.5rem;box-shadow:0 .3rem 1.2rem rgba(0,0,0,.3);padding:.6rem .8rem;
font-size:.85rem;line-height:1.4}
#tip dl{gap:.1rem .8rem;margin:.35rem 0}
#tip table{border-collapse:collapse;width:100%}
#tip th{font-weight:400;color:var(--dim);text-align:left;padding:0 .5rem 0 0}
#tip td{padding:.05rem .5rem .05rem 0;white-space:pre}
#tip td.number{text-align:right;font-variant-numeric:tabular-nums}
#tip .drawn td{font-weight:600}
.word{font-family:ui-monospace,monospace;white-space:pre-wrap}
.share{height:.4rem;margin:1px 0;border-radius:.15rem;background:rgb(var(--low))}
.share.controlled{background:rgb(var(--high))}
#tip th.base,#tip th.controlled{padding:0;text-align:right}
#tip th.base::before,#tip th.controlled::before{content:"";display:inline-block;width:.55rem;height:.55rem;
margin-right:.3rem;border-radius:.15rem;background:rgb(var(--low))}
#tip th.controlled::before{background:rgb(var(--high))}
"""
)

_TOOL = """<div id="tool" hidden>
<div class="bar">
<fieldset id="measures"><legend>Colour</legend></fieldset>
<label id="of" hidden>V of <select id="objective"></select></label>
<span class="note"><span id="least"></span><span class="scale" id="scale"></span><span id="most"></span></span>
</div>
<p class="note key"><span>Underlined</span>: the other policy would have drawn another token there with the same noise.
<b>Marked</b>: where the two part. Point at a token, or move with the arrow keys.</p>
</div>
<noscript><p class="card">The colours need JavaScript, which is switched off in this browser.</p></noscript>"""

_SIDES = """<div class="sides">
{base}
{controlled}
</div>
<div id="tip" role="tooltip" hidden></div>"""


def check_trace_output(output: str | os.PathLike) -> tuple[Path, Path]:
    """
    The page and the JSON file that [`write_trace`] writes.

    Raises:
        `OSError`: if they cannot be written, or a file that is no trace has the name of one of them.
    """
    output = Path(output)
    if output.suffix.lower() in (_PAGE, _JSON):
        page, record = output.with_suffix(_PAGE), output.with_suffix(_JSON)
    else:
        page, record = output / f"{_NAME}{_PAGE}", output / f"{_NAME}{_JSON}"
    for path in (page, record):
        check_target(path)
    if record.exists() and not _is_trace(record):
        raise OSError(f"{record} is no trace, and the JSON of the new one would replace it: name another output.")
    if page.exists() and _MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise OSError(f"{page} is no trace, and the page of the new one would replace it: name another output.")
    return page, record


def _is_trace(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("kind") == KIND


def write_trace(trace: Trace, output: str | os.PathLike) -> tuple[Path, Path]:
    """
    Write a trace as a page that needs no other file and no network, and as JSON. An earlier trace is replaced.

    Args:
        trace ([`Trace`]):
            What to write.
        output (`str` or `os.PathLike`):
            A folder, for `trace.html` and `trace.json`; or a name that ends in `.html` or `.json`, for a file of each
            kind.

    Returns:
        The paths of the page and of the JSON file.

    Raises:
        `OSError`: if they cannot be written, or a file that is no trace has the name of one of them.
    """
    page, record = check_trace_output(output)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, trace.to_dict())
    write_page(page, trace_page(trace))
    return page, record


def trace_page(trace: Trace) -> str:
    """The page of a trace."""
    # A script element ends at its end tag wherever that stands: no text may spell one.
    said = trace.to_dict()
    # The page is for others too: of a folder its own name.
    said["model"] = said["model"] and without_place(said["model"])
    data = json.dumps(said).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    content = [
        facts_list(_facts(trace)),
        _prompt(trace),
        _TOOL,
        _SIDES.format(
            base=_side("base", "Base", trace.base), controlled=_side("controlled", "Controlled", trace.controlled)
        ),
        f"<script {_MARK}>{data}</script>",
    ]
    return html_page("What control did", _STYLE, content, SCRIPT)


def _facts(trace: Trace) -> dict[str, str]:
    control, parts_at = trace.control, trace.parts_at
    count = len(trace.controlled.tokens)
    ratio = trace.controlled.nats / count if count else 0.0
    speed = [1000 * each.seconds / max(1, len(each.tokens)) for each in (trace.base, trace.controlled)]
    settings = "off"
    if control is not None:
        shown = {name: value for name, value in control.items() if name != "method" and value not in (0, None)}
        if control["method"] != "ascent":
            shown.pop("num_steps", None)
        settings = f"{control['method']}, {', '.join(f'{name} {value}' for name, value in shown.items())}"
    heads = ", ".join(f"{name} {weight:g}" for name, weight in trace.heads.items())
    critics = [f"{name}: {why}" if len(trace.heads) > 1 else why for name, why in trace.silent_critics.items()]
    return {
        "Base model": Path(trace.model).name if trace.model else "unknown",
        "Control": f"{settings}, at {trace.hook_point}",
        **({"Heads": heads} if len(trace.heads) > 1 else {}),
        **({"Critic": f"not shown: {'; '.join(critics)}"} if critics else {}),
        "Drawn": "greedily" if trace.temperature == 0 else f"at temperature {trace.temperature:g}, seed {trace.seed}",
        "Spent": f"{trace.controlled.nats:.3g} nats in {count} tokens, {ratio:.3g} a token",
        "The two part": "never: they are the same" if parts_at is None else f"at token {parts_at + 1}",
        "Time": f"{speed[0]:.3g} ms a token (base), {speed[1]:.3g} ms (controlled)",
    }


def _prompt(trace: Trace) -> str:
    prompt = trace.prompt
    messages = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    said = "\n".join(
        f'<div class="role">{escape(str(message["role"]))}</div><div class="text" dir="auto">'
        f"{escape(message_text(message))}</div>"
        for message in messages
    )
    return f'<section class="card">{said}</section>'


def _side(name: str, heading: str, response: TracedResponse) -> str:
    ended = "" if response.finished else ", cut at the token limit"
    return (
        f'<section class="card" aria-label="{heading}"><h2>{heading}</h2>'
        f'<div class="note">{len(response.tokens)} tokens{ended}</div>\n'
        # Until the script splits it, and where none runs.
        f'<div class="tokens" id="{name}" dir="auto">{escape(response.text)}</div>\n'
        f'<div id="{name}-plots"></div></section>'
    )
