"""A comparison's plots: what reward costs, in nats, in diversity, in time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from ...utils.extras import needs_extra
from ...utils.files import atomic_path
from .figures import Figure

# Of each plot its file, the metric along x, and what stands there.
PLOTS = {
    "frontier.svg": ("kl_per_response", "KL to the base, nats an answer"),
    "diversity.svg": ("diversity", "diversity"),
    "time.svg": ("seconds", "seconds an answer"),
}


def write_plots(
    folder: Path,
    figures: Sequence[Figure],
    pools: Sequence[str] = (),
    names: Sequence[str] = tuple(PLOTS),
    marked: tuple[str, float | None] | None = None,
) -> None:
    """
    Draw reward against what it costs, one file for each of [`PLOTS`]: a point with its 95 % interval for each control
    and strength, a line through the strengths of one, and the best of n as a curve.

    Args:
        folder (`Path`):
            Where the files go.
        pools (sequence of `str`):
            Names of the controls that are a best of n.
        names (sequence of `str`):
            Which of the plots.
        marked (`tuple[str, float]`, *optional*):
            The control and the strength that a ring is drawn around.
    """
    with needs_extra("compare", "Plots"):
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    found = {(f.control, f.strength, f.metric): f for f in figures}
    controls = list(dict.fromkeys(f.control for f in figures))
    for name in names:
        along, label = PLOTS[name]
        with matplotlib.rc_context({"svg.hashsalt": "hf_recontrol", "svg.fonttype": "none"}):
            canvas = Canvas(figsize=(7, 4.5), layout="constrained")
            axes = canvas.subplots()
            for control in controls:
                points = _points(found, control, along)
                if not points:
                    continue
                x, y = [p.value for p, _ in points], [q.value for _, q in points]
                shown = _shown(control)
                if control in pools:
                    axes.plot(x, y, "--", color="grey", label=f"{shown} (n up to {len(points)})")
                    continue
                errors = [
                    [max(0.0, q.value - q.low) for _, q in points],
                    [max(0.0, q.high - q.value) for _, q in points],
                ]
                finite = all(e < float("inf") for side in errors for e in side)
                axes.errorbar(x, y, errors if finite else None, marker="o", capsize=3, label=shown)
            if marked is not None and (*marked, "reward") in found and (*marked, along) in found:
                place = [found[(*marked, along)].value], [found[(*marked, "reward")].value]
                axes.plot(*place, "o", markersize=16, fillstyle="none", color="black", label="recommended")
            axes.set_xlabel(label)
            axes.set_ylabel("reward")
            axes.grid(alpha=0.3)
            if axes.has_data():
                axes.legend(fontsize="small")
            # No time in it: the same figures make the same file.
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                # Letters are drawn by who shows the file, with fonts of their own.
                warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
                canvas.savefig(buffer, format="svg", metadata={"Date": None})
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(buffer.getvalue())


def _shown(control: str) -> str:
    """A control's name for a legend: not too long, no formula, not hidden as those are that begin with _."""
    name = control if len(control) <= 40 else f"{control[:39]}…"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def _points(
    found: dict[tuple[str, float | None, str], Figure], control: str, along: str
) -> list[tuple[Figure, Figure]]:
    """(where along x, how high) of a control's strengths, the weakest first."""
    strengths = [s for own, s, what in found if own == control and what == "reward" and (own, s, along) in found]
    return [
        (found[control, s, along], found[control, s, "reward"])
        for s in sorted(strengths, key=lambda s: -1.0 if s is None else s)
    ]
