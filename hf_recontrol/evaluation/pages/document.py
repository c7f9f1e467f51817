"""What all pages share: one HTML file that needs no other, in light and in dark, and runs its own script alone."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...utils.files import atomic_path

STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--dim:#59636e;--page:#f6f8fa;--card:#fff;--line:#d1d9e0;--mark:#0969da;
--warn:#fff8c5}
@media (prefers-color-scheme:dark){
:root{--text:#e6edf3;--dim:#9198a1;--page:#0d1117;--card:#161b22;--line:#3d444d;--mark:#4493f8;--warn:#3b300d}}
body{margin:0 auto;padding:2rem 1rem 4rem;font:1rem/1.5 system-ui,sans-serif;color:var(--text);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 1rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem;margin:1rem 0}
.note,dt,.role{color:var(--dim)}.text{white-space:pre-wrap}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.5rem;margin:0}dd{margin:0}
[hidden]{display:none}
"""

# The ends of a diverging scale, laid over the page with an opacity, so that they suit a light and a dark one.
LOW, HIGH, OPACITY = "37,111,225", "225,60,45", 0.65


def html_page(title: str, style: str, content: Sequence[str], script: str = "", attributes: str = "") -> str:
    """
    A whole page.

    Args:
        title (`str`):
            Its title, as text.
        style (`str`):
            CSS of its own, behind what all pages share.
        content (sequence of `str`):
            HTML, whose texts are escaped.
        script (`str`, *optional*):
            Its one script, which runs when all content is there.
        attributes (`str`, *optional*):
            Of its body, as HTML.
    """
    policy, tail = "default-src 'none'; style-src 'unsafe-inline'", []
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        tail = [f"<script>{script}</script>"]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            # Texts are escaped; this keeps a browser from loading or running anything else should one ever not be.
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>",
            f"<body{attributes and f' {attributes}'}>\n<h1>{escape(title)}</h1>",
            *content,
            *tail,
            "</body>\n</html>\n",
        ]
    )


def write_page(path: str | os.PathLike, page: str) -> None:
    """Write a page; missing folders are created, and an older page stays as it is until the new one is complete."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        # Byte-level tokens may hold lone surrogates, which UTF-8 has no bytes for.
        temporary.write_text(page, encoding="utf-8", errors="replace", newline="\n")


def facts_list(facts: dict[str, str]) -> str:
    """Labels and texts, in their order; nothing if there are none."""
    rows = "".join(f"<dt>{escape(str(label))}</dt><dd>{escape(str(text))}</dd>\n" for label, text in facts.items())
    return f'<dl class="card">\n{rows}</dl>' if rows else ""
