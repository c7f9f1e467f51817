"""A comparison's table, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .figures import Figure, row_label

# Metrics of the table, in its order, with their columns' heads and digits. Those that differ between prompts have
# their intervals.
_COLUMNS = {
    "kl_per_token": ("KL a token", 3),
    "kl_per_response": ("KL an answer", 2),
    "judge": ("judge", 3),
    "win_rate": ("win rate", 2),
    "diversity": ("diversity", 3),
    "coherence": ("coherence", 3),
    "perplexity": ("perplexity", 1),
    "length": ("length", 1),
    "finished": ("finished", 2),
    "seconds": ("s an answer", 3),
}
_WITH_INTERVAL = ("reward", "judge", "win_rate")


def table(
    figures: Sequence[Figure], against: str, count: int, pools: Sequence[str] = (), notes: Sequence[str] = ()
) -> str:
    """
    The figures as a Markdown table, a line for each control and strength, with 95 % intervals.

    Args:
        figures (sequence of [`Figure`]):
            All of a comparison.
        against (`str`):
            The control that differences are to.
        count (`int`):
            Prompts that were compared on.
        pools (sequence of `str`):
            Names of the controls that are a best of n: of these, powers of 2 and the largest n are shown.
        notes (sequence of `str`):
            What stands under the table.
    """
    by_row: dict[tuple[str, float | None], dict[str, Figure]] = {}
    for figure in figures:
        by_row.setdefault((figure.control, figure.strength), {})[figure.metric] = figure
    rows = {key: found for key, found in by_row.items() if key[0] not in pools or _is_shown(*key, by_row)}
    rewards = [
        name for name in dict.fromkeys(f.metric for f in figures) if name == "reward" or name.startswith("reward ")
    ]
    columns = {name: (name, 3) for name in rewards} | _COLUMNS
    columns = {name: said for name, said in columns.items() if any(name in found for found in rows.values())}
    heads = ["control", "strength"]
    for name, (head, _) in columns.items():
        heads += [head, f"Δ to {against}"] if name in rewards else [head]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * 2}{'---:|' * (len(heads) - 2)}"]
    for (control, strength), found in rows.items():
        cells = [control.replace("|", "\\|"), "" if strength is None else f"{strength:g}"]
        for name, (_, digits) in columns.items():
            figure = found.get(name)
            with_interval = name in _WITH_INTERVAL or name in rewards
            cells.append(_cell(figure and (figure.value, figure.low, figure.high), digits, with_interval))
            if name in rewards:
                change = figure and figure.difference is not None
                cells.append(
                    _cell((figure.difference, figure.difference_low, figure.difference_high), digits, True, "+")
                    if change
                    else ""
                )
        lines.append(f"| {' | '.join(cells)} |")
    said = [
        f"{count} prompts. Brackets hold 95 % intervals (bootstrap over prompts; of differences, paired).",
        *notes,
        *_wide(rows, rewards),
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(said) + "\n"


def _is_shown(control: str, strength: float, rows: Iterable[tuple[str, float]]) -> bool:
    n, largest = int(strength), max(strength for name, strength in rows if name == control)
    return n > 1 and (n & (n - 1) == 0 or n == largest)


def _cell(values: tuple[float, float, float] | None, digits: int, with_interval: bool, sign: str = "") -> str:
    if values is None:
        return ""
    # Adding 0 takes the sign off what is rounded to -0.
    value, *ends = (f"{round(x, digits) + 0.0:{sign}.{digits}f}" if math.isfinite(x) else "?" for x in values)
    return f"{value} [{', '.join(ends)}]" if with_interval else value


def _wide(rows: dict, rewards: Sequence[str]) -> list[str]:
    """Which differences of rewards nobody can tell from none."""
    open_ones = [
        row_label(control, strength)
        for (control, strength), found in rows.items()
        for name in rewards[:1]
        if name in found
        and found[name].difference is not None
        and found[name].difference_low <= 0 <= found[name].difference_high
        and found[name].difference_low < found[name].difference_high
    ]
    if not open_ones:
        return []
    return [
        f"Intervals too wide to tell from no difference in reward: {', '.join(open_ones)}. More prompts narrow them."
    ]
