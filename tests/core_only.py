"""
What must hold where a built wheel of hf_recontrol is installed with its core dependencies alone: imports, attach,
generate, save, load, the command, the quickstart. `make test-wheel` and `make test-oldest` run it outside of the
source folder.

    python tests/core_only.py dist
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import hf_recontrol
from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig

EXTRAS = ("accelerate", "datasets", "matplotlib", "pyarrow", "gguf", "vaderSentiment")
TESTS = Path(__file__).resolve().parent
SHIPPED = (
    "py.typed",
    "cli/stages.py",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "pipelines/demo_prompts.jsonl",
)


def check_archives(dist: Path) -> None:
    """One wheel and one source archive, with all that the code reads, and nothing else of the repo."""
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    stem = sdist.name.removesuffix(".tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {Path(name).relative_to(stem).as_posix() for name in archive.getnames()}
    for name in SHIPPED:
        assert f"hf_recontrol/{name}" in in_wheel & in_sdist, f"hf_recontrol/{name} is missing from {wheel} or {sdist}"
    assert f"{stem}.dist-info/licenses/LICENSE" in in_wheel, f"{wheel} holds no LICENSE"
    assert {"LICENSE", "README.md", "setup.cfg", "pyproject.toml"} <= in_sdist, f"{sdist} cannot be built from"
    folders = {name.split("/")[0] for name in in_wheel}
    assert folders == {"hf_recontrol", f"{stem}.dist-info"}, f"{wheel} holds more than the package: {folders}"
    folders = {name.split("/")[0] for name in in_sdist if "/" in name}
    assert folders == {"hf_recontrol", "hf_recontrol.egg-info"}, f"{sdist} holds more than the package: {folders}"


def run(*command) -> str:
    """What a command prints for somebody who never set HF_HUB_OFFLINE."""
    online = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=online, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def main(dist: Path) -> None:
    check_archives(dist)
    installed = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    assert not installed, f"these are no core dependencies: {installed}"
    assert Path(hf_recontrol.__file__).is_relative_to(sys.prefix), f"not the wheel's: {hf_recontrol.__file__}"
    recontrol = Path(sys.executable).with_name("recontrol")

    imported = set(run(sys.executable, TESTS / "import_all.py").split())
    assert {f"hf_recontrol.{name}" for name in ("modeling.causal_lm", "heads.hub", "heads.convert", "cli")} <= imported
    assert "generate" in run(recontrol, "--help")

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=97, initializer_range=0.3, eos_token_id=None, pad_token_id=0, **sizes)
    inputs = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 12, "do_sample": False}
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder, "base"), Path(folder, "head")
        LlamaForCausalLM(config).save_pretrained(base)
        tiny_tokenizer(chat=True).save_pretrained(base)
        plain = LlamaForCausalLM.from_pretrained(base).generate(**inputs)

        control = ControlConfig("ascent", step_size=3.0)
        head = ValueHead(ValueHeadConfig(32, head_sizes=[16], base_model_name_or_path=str(base), control=control))
        model = ReControlForCausalLM.from_model(LlamaForCausalLM.from_pretrained(base), head)
        controlled = model.generate(**inputs)
        assert not torch.equal(controlled, plain) and torch.equal(model.generate(**inputs, control=False), plain)
        assert model.values(inputs["input_ids"]).shape == (1, 3, 1)

        model.save_pretrained(saved)
        again = ReControlForCausalLM.from_pretrained(saved)
        assert torch.equal(again.generate(**inputs), controlled)
        assert type(again.unload()) is LlamaForCausalLM

        assert "head_sizes" in run(recontrol, "info", saved)
        assert "expected reward" in run(sys.executable, TESTS.parent / "examples" / "quickstart.py", saved)
    packages = ("hf_recontrol", "transformers", "torch", "safetensors", "huggingface_hub")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"The wheel works with its core dependencies alone: {versions}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
