"""What a comparison leaves in its folder: all answers (Parquet) and all figures (CSV, JSON)."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...data.rollouts import Rollout
from ...utils.extras import needs_extra
from ...utils.files import atomic_path
from ..intervals import finite
from .figures import Figure

ANSWERS_NAME = "answers.parquet"
FIGURES_NAME = "figures.csv"
FIGURES_JSON_NAME = "figures.json"


def written_prompt(prompt: Any) -> str:
    """A prompt as the file of answers has it: a text, or a chat as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def write_answers(
    path: Path, rows: Sequence[tuple[str, float | None, Sequence[Rollout], dict[str, Sequence[float | None]]]]
) -> None:
    """
    All answers as one Parquet file: a line for each, `control`, `strength`, `prompt` (a text, or a chat as JSON),
    `prompt_number`, `sample`, `completion`, `prompt_ids`, `completion_ids`, `finished`, and all numbers measured.

    Args:
        rows (sequence of tuples):
            Of each row of the comparison: control, strength, answers, and what was measured of each by name.
    """
    with needs_extra("compare", "Writing answers"):
        import pyarrow as pa
        import pyarrow.parquet as parquet
    names = dict.fromkeys(name for *_, measured in rows for name in measured)
    ids = pa.list_(pa.int32())
    schema = pa.schema(
        {
            "control": pa.string(),
            "strength": pa.float64(),
            "prompt": pa.string(),
            "prompt_number": pa.int64(),
            "sample": pa.int32(),
            "completion": pa.string(),
            "prompt_ids": ids,
            "completion_ids": ids,
            "finished": pa.bool_(),
            **dict.fromkeys(names, pa.float64()),
        }
    )
    with atomic_path(path) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for control, strength, rollouts, measured in rows:
            lines = [
                {
                    "control": control,
                    "strength": strength,
                    "prompt": written_prompt(r.prompt),
                    "prompt_number": r.prompt_number,
                    "sample": r.sample,
                    "completion": r.completion,
                    "prompt_ids": r.prompt_ids,
                    "completion_ids": r.completion_ids,
                    "finished": r.finished,
                    **{name: measured[name][place] for name in names if name in measured},
                }
                for place, r in enumerate(rollouts)
            ]
            writer.write_table(pa.Table.from_pylist(lines, schema))


def write_figures(folder: Path, figures: Sequence[Figure], about: dict[str, Any]) -> None:
    """
    All figures as `figures.csv`, a line each, and with what they are of as `figures.json`. Ends of intervals that are
    not finite are left empty (`null`).
    """
    names = [item.name for item in fields(Figure)]
    lines = [{name: finite(value) for name, value in asdict(figure).items()} for figure in figures]
    with atomic_path(folder / FIGURES_NAME) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)
    with atomic_path(folder / FIGURES_JSON_NAME) as temporary:
        text = json.dumps(about | {"figures": lines}, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")
