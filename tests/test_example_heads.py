"""The heads in examples/heads: small, whole, and worth something on the real model that they are for."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_recontrol import ReControlForCausalLM, SamplingSettings, ValueHead, embedded_model, generate_rollouts, vader

HEADS = sorted(path.parent for path in Path(__file__).parents[1].glob("examples/heads/*/config.json"))


@pytest.mark.parametrize("folder", HEADS, ids=lambda folder: folder.name)
def test_a_head_is_small_whole_and_knows_its_base(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 2 * 2**20
    files = {"README.md", "config.json", "model.safetensors", "prompts.safetensors"}
    assert {file.name for file in folder.iterdir()} == files
    head = ValueHead.from_pretrained(folder)
    assert head.config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head.config.control is not None and head.config.advantage_sizes and head.config.static_vector
    assert all(parameter.dtype == torch.float32 for parameter in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("folder", [folder for folder in HEADS if folder.name == "smollm2-vader"])
def test_vader_rises_under_its_head(folder):
    model = ReControlForCausalLM.from_pretrained(embedded_model(), value_head=folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    prompts = [f"Tell me about {thing}." for thing in ("my neighbour", "a long day", "the news", "a rainy evening")]
    settings = SamplingSettings(num_samples=4, max_new_tokens=40, temperature=0.9)
    rewards = []
    for control in (False, model.control):
        rollouts = generate_rollouts(model, tokenizer, prompts, settings, control=control)
        rewards.append(sum(vader([r.prompt for r in rollouts], [r.completion for r in rollouts])) / len(rollouts))
    assert rewards[1] > rewards[0] + 0.1
