"""What `make bench-gpu` does on a GPU, on the CPU: all of it runs, and what is wrong is said."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from hf_recontrol.control import ascent

from .fresh import run_script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_all_of_it_runs_without_a_gpu_and_finds_nothing_wrong(tmp_path):
    words = ["--device", "cpu", "--small", "--rounds", "1", "--batch-sizes", "2", "--output", "figures.json"]
    code, out, err = run_script(SCRIPT, words, timeout=600, cwd=tmp_path)
    assert code == 0, out + err
    figures = json.loads((tmp_path / "figures.json").read_text())
    for part, count in (("right", 36), ("modes", 12), ("edit", 5)):
        assert len(figures[part]) == count
        assert all(row["right"] for row in figures[part])
    assert "WRONG" not in out
    (batch,) = figures["overhead"]["results"]
    assert {"ascent, n=200", "advantage", "static"} <= {row["control"] for row in batch["rows"]}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module(SCRIPT.stem)


def test_a_form_that_is_wrong_is_found(benchmark, monkeypatch, capsys):
    right = ascent._ascend_by_flips
    monkeypatch.setattr(ascent, "_ascend_by_flips", lambda *given: 1.01 * right(*given))
    rows = benchmark.right("cpu")
    wrong = {row["control"] for row in rows if not row["right"]}
    assert {"ascent, n=30", "ascent, n=200", "ascent of a mixture"} <= wrong
    assert not wrong & {"ascent of two layers", "ascent, GELU", "advantage", "advantage of a mixture", "static"}
    assert capsys.readouterr().out.count("WRONG") == sum(not row["right"] for row in rows)


@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "two positions"])
def test_logits_that_are_partly_wrong_are_found(benchmark, monkeypatch, fault):
    plain = benchmark.logits_of
    monkeypatch.setattr(benchmark, "CONTROLS", [row for row in benchmark.CONTROLS if row[0] == "static"])
    monkeypatch.setattr(benchmark, "LAYER_CONTROLS", [])

    asked = []

    def partly_wrong(model, *given):
        logits = plain(model, *given)
        asked.append(model.dtype)
        if len(asked) > 1:  # the first is what the others are held against
            if fault == "two positions":
                logits[:, :2] *= 5
            else:
                logits[..., :5] = float(fault)
        return logits

    monkeypatch.setattr(benchmark, "logits_of", partly_wrong)
    double, single = benchmark.right("cpu")
    # In float32 a tenth of the rows may differ.
    assert not double["right"] and single["right"] == (fault == "two positions")


def test_what_there_is_no_time_for_is_left_out_and_named(benchmark, capsys):
    assert benchmark.modes("cpu", {}, {}, end=0) == []
    assert benchmark.edits("cpu", 64, [1], 1, {}, end=0) == []
    assert capsys.readouterr().out.count("left out") == len(benchmark.MODES) + 5
    assert benchmark.overheads("cpu", [1], 1, small=True, seconds=0.1) is None
    assert "stopped after 0 s" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path):
    code, _, err = run_script(SCRIPT, [], timeout=120, cwd=tmp_path)
    assert code == 2
    assert "--device cpu --small" in err
