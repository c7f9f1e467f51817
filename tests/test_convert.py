"""The authors' checkpoints as heads."""

import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead
from hf_recontrol.heads.convert import convert_checkpoint

from .tiny_models import prompts, tiny_model

COMMAND = str(Path(sys.executable).with_name("recontrol"))


class ThreeLayers(nn.Module):
    """RE-Control's value function as it is trained: fc1, fc2, fc3; the two-layer one has no fc2."""

    def __init__(self, width, hidden, two=False):
        super().__init__()
        self.fc1, self.fc3 = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        if not two:
            self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, x):
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x)) if hasattr(self, "fc2") else x
        return self.fc3(x)


class Sequence(nn.Module):
    """PRE-Control's: any widths, five attributes."""

    def __init__(self, width, *hidden):
        super().__init__()
        sizes = [width, *hidden, 5]
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.layers = nn.Sequential(*[module for pair in pairs for module in pair][:-1])

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    ("network", "sizes"),
    [(ThreeLayers(16, 24), [24, 24]), (ThreeLayers(16, 24, two=True), [24]), (Sequence(16, 20, 12), [20, 12])],
    ids=["three", "two", "pre-control"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_has_the_network_s_values(tmp_path, network, sizes, dtype):
    network = network.to(dtype)
    torch.save(network.state_dict(), tmp_path / "value.pth")
    head = convert_checkpoint(tmp_path / "value.pth")
    x = torch.randn(7, 16)
    torch.testing.assert_close(head(x), network.float()(x), rtol=1e-5, atol=1e-6)
    assert head.config.head_sizes == sizes and head.config.hook_point == "lm_head"
    assert head.config.num_objectives == network(x).shape[-1]
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "parallel.pth")
    assert torch.equal(convert_checkpoint(tmp_path / "parallel.pth")(x), head(x))


def test_the_command_makes_a_head_that_steers(tmp_path):
    torch.save(ThreeLayers(16, 24).state_dict(), tmp_path / "value.pth")
    model = tiny_model("llama", dtype=torch.float32)
    command = [COMMAND, "convert", "value.pth", "-o", "head", "--base", "org/base", "--step-size", "0.5"]
    done = subprocess.run(
        [*command, "--num-steps", "30"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    assert "16 - 24 - 24 - 1" in done.stdout
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.base_model_name_or_path == "org/base"
    assert head.config.control == ControlConfig(step_size=0.5, num_steps=30)
    controlled = ReControlForCausalLM.from_model(model, tmp_path / "head")
    assert controlled.generate(prompts(), max_new_tokens=3).shape == (2, 10)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "norm.weight": torch.ones(3)}, "holds 'norm.weight'"),
        (lambda s: {**s, "fc1.weight": torch.ones(24, 16, dtype=torch.int64)}, "holds 'fc1.weight'"),
        (lambda s: {**s, 3: torch.ones(1)}, "holds 3"),
        (lambda s: without(s, "fc2.bias"), "not one weight and one bias"),
        (lambda s: {**s, "fc2.weight": torch.ones(24, 23)}, "do not follow each other"),
        (lambda s: {**s, "fc2.bias": torch.ones(1)}, "do not follow each other"),
        (lambda s: {**s, "fc1.weight": torch.full((24, 16), torch.nan)}, "NaN or infinite"),
        (lambda s: {**s, "module.fc1.weight": s["fc1.weight"]}, "not one weight and one bias"),
        (lambda s: {"layers.0.weight": s["fc1.weight"], "layers.1.weight": s["fc2.weight"]}, "not one weight"),
        (
            lambda s: {
                **without(without(s, "fc2.weight"), "fc2.bias"),
                "fc4.weight": s["fc2.weight"],
                "fc4.bias": s["fc2.bias"],
            },
            "expected fc1, fc2, fc3",
        ),
        (lambda s: {**s, "fc02.weight": s["fc2.weight"]}, "holds 'fc02.weight'"),
        # One number in the file, a terabyte to whoever copies it.
        (lambda s: {"fc1.weight": torch.zeros(1).expand(500_000, 500_000)}, "holds 'fc1.weight'"),
        (lambda s: {**s, "fc1.weight": torch.ones(24, 16, device="meta")}, "holds 'fc1.weight'"),
        (lambda s: {**s, "fc1.weight": s["fc1.weight"].to_sparse()}, "holds 'fc1.weight'"),
        (lambda s: Sequence(16, 8).layers[1:].state_dict(prefix="layers."), "expected 0, 2, 4"),
        (lambda s: [1, 2], "holds list"),
        (lambda s: {}, "holds dict"),
    ],
)
def test_anything_else_in_the_file_is_an_error(tmp_path, change, message):
    torch.save(change(ThreeLayers(16, 24).state_dict()), tmp_path / "value.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "value.pth")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_nothing_in_the_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc1.weight": Evil()}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    Path("text.pth").write_text("hello")
    Path("empty.pth").write_bytes(b"")
    Path("short.pth").write_bytes(b"\x80\x02.")  # what the unpickler pops from an empty stack is an IndexError
    torch.save(ThreeLayers(16, 24), "module.pth")
    for name in ("evil", "plain", "text", "empty", "short", "module"):
        with pytest.raises(ValueError, match=rf"{name}\.pth is no file of tensors alone"):
            convert_checkpoint(f"{name}.pth")
    assert not Path("touched").exists()
    with pytest.raises(OSError, match="is no file"):
        convert_checkpoint("absent.pth")


def test_the_base_is_named_so_that_any_folder_finds_it_and_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ThreeLayers(16, 24).state_dict(), "value.pth")
    Path("models/base").mkdir(parents=True)
    Path("models/base/config.json").write_text('{"model_type": "llama"}')
    head = convert_checkpoint("value.pth", base_model="models/base")
    assert head.config.base_model_name_or_path == str(tmp_path / "models/base")
    with pytest.raises(OSError, match="not a head's"):
        head.save_pretrained("models/base")
    command = [COMMAND, "convert", "value.pth", "-o", "models/base"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "not a head's" in done.stderr
    assert Path("models/base/config.json").read_text() == '{"model_type": "llama"}'
