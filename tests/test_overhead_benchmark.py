"""What `make bench` counts and prints, without its minutes. All of it runs in test_gpu_benchmark.py."""

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("overhead")


@pytest.fixture
def counts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("counts")


def test_flips_are_counted_at_each_step_and_units_once(counts):
    head = ValueHead(ValueHeadConfig(hidden_size=1, head_sizes=[2]))
    first, out = head.value_mlp.layers
    with torch.no_grad():  # V = -|x|, around which steps of 0.5 swing
        first.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        first.bias.zero_()
        out.weight.fill_(-1)
    flips = counts.flips_of([head], torch.tensor([[0.3], [100.0]]), ControlConfig(step_size=0.5, num_steps=10))
    assert flips == (9 * 2 / 2, 2 / 2)


@torch.no_grad()
def test_bytes_are_those_of_the_matrices_and_of_the_rows_that_are_picked(counts):
    matrix, left = torch.zeros(8, 4), torch.zeros(3, 8)
    with counts.MatrixBytes() as read:
        torch.addmm(torch.zeros(4), left @ matrix @ matrix.T, matrix)
    assert read.count == 3 * 8 * 4 * 4
    with counts.MatrixBytes() as read:
        torch.nn.functional.embedding_bag(torch.tensor([1, 1, 5]), matrix, torch.tensor([0, 2]), mode="sum")
        matrix[torch.tensor([0, 7])]
    assert read.count == (3 + 2) * 4 * 4


def test_the_interval_is_that_of_the_median_and_not_of_the_rounds(overhead):
    values = np.random.default_rng(0).normal(1, 0.1, 400)
    low, high = overhead.interval(values)
    assert low < np.median(values) < high
    # 1.96 standard errors, sqrt(pi / 2) / sqrt(400) of the deviation each, on either side.
    assert high - low == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 20, rel=0.3)


def test_small_shares_are_timed_until_their_intervals_are_narrow(overhead):
    noise = np.random.default_rng(0)
    decoding = SimpleNamespace(
        warm_up=lambda variant=None: (torch.tensor(0 if variant is None else 1), 0 if variant is None else 7),
        seconds=lambda variant=None: noise.normal(1.0, 0.01),
    )
    by_name = {variant.name: variant for variant in overhead.chosen_variants(["advantage", "direct loop, n=30"])}
    args = argparse.Namespace(rounds=5, interval=0.01)
    (row,), _ = overhead.measure(decoding, [by_name["advantage"]], None, args)
    assert 20 <= row["rounds"] < 100
    assert row["high"] - row["low"] <= 0.01
    assert row["matrix_bytes"] == 7
    (row,), _ = overhead.measure(decoding, [by_name["the direct loop, n=30"]], None, args)
    assert row["rounds"] == 5
    args.interval = 0.0
    (row,), _ = overhead.measure(decoding, [by_name["advantage"]], None, args)
    assert row["rounds"] == overhead.AT_MOST * 5


def test_a_target_stands_beside_the_figures_that_it_holds_for(overhead, capsys):
    def result(size):
        names = ["ascent, n=30", "ascent, n=200", *(["three hidden layers, n=30"] if size == 1 else [])]
        return {
            "batch_size": size,
            "rows": [
                {
                    "control": name,
                    "ratio": 1.0,
                    "low": 0.9,
                    "high": 1.1,
                    "matrix_bytes": 2e6,
                    "flips": 12.4,
                    "flippers": 3.6,
                }
                | {"target": overhead.target_of(name, size)}
                for name in names
            ],
        }

    overhead.print_table([result(1), result(8)])
    assert capsys.readouterr().out.splitlines()[3:] == [
        "| ascent, n=30 | 1.000 [0.900, 1.100], target 1.05 | 1.000 [0.900, 1.100] | 12 | 4 | 2 |",
        "| ascent, n=200 | 1.000 [0.900, 1.100], target 1.1 | 1.000 [0.900, 1.100], target 1.1 | 12 | 4 | 2 |",
        "| three hidden layers, n=30 | 1.000 [0.900, 1.100], target 1.3 |  | 12 | 4 | 2 |",
    ]


def test_rows_are_chosen_by_a_part_of_their_name(overhead):
    names = [variant.name for variant in overhead.chosen_variants(["three hidden", "static"])]
    assert names == ["static", "three hidden layers, n=30", "three hidden layers, n=200"]
    with pytest.raises(ValueError, match=r"no row's name holds 'four hidden'.*two hidden layers, n=30"):
        overhead.chosen_variants(["static", "four hidden"])
