"""
What must work where hf_recontrol is installed with its core dependencies alone: attach, generate, save, load, and the
command. `make test-oldest` runs it on the built wheel, outside of this folder.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead, ValueHeadConfig

EXTRAS = ("accelerate", "datasets", "matplotlib", "pyarrow", "gguf", "vaderSentiment")


def main() -> None:
    installed = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
    assert not installed, f"these are no core dependencies: {installed}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)
    config.eos_token_id, config.pad_token_id = None, 0
    inputs = {"input_ids": torch.tensor([[1, 5, 9]]), "max_new_tokens": 12, "do_sample": False}
    with tempfile.TemporaryDirectory() as folder:
        base, saved = Path(folder, "base"), Path(folder, "head")
        LlamaForCausalLM(config).save_pretrained(base)
        plain = LlamaForCausalLM.from_pretrained(base).generate(**inputs)
        head = ValueHead(ValueHeadConfig(32, head_sizes=[16], base_model_name_or_path=str(base)))
        model = ReControlForCausalLM.from_model(
            LlamaForCausalLM.from_pretrained(base), head, ControlConfig("ascent", 3.0)
        )
        controlled = model.generate(**inputs)
        assert not torch.equal(controlled, plain) and torch.equal(model.generate(**inputs, control=False), plain)
        assert model.values(inputs["input_ids"]).shape == (1, 3, 1)
        model.save_pretrained(saved)
        again = ReControlForCausalLM.from_pretrained(saved)
        assert torch.equal(again.generate(**inputs), controlled)
        command = Path(sys.executable).with_name("recontrol")
        shown = subprocess.run([command, "info", saved], capture_output=True, text=True, check=True).stdout
        assert "head_sizes" in shown, shown
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("hf_recontrol", "transformers", "torch"))
    print(f"The core works: {versions}.")


if __name__ == "__main__":
    main()
