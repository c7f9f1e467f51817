"""
From prompts to a head in a few lines of Python.

    python examples/train_head.py org/base my-head

The reward here is VADER's sentiment; any function `f(prompts, completions, **columns) -> list[float]` does, and
`ClassifierReward.from_pretrained("org/reward-model")` scores with a sequence classifier.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHeadConfig
from hf_recontrol.activations import collect_states
from hf_recontrol.rewards import score_rollouts, vader
from hf_recontrol.rollouts import generate_rollouts, load_prompts
from hf_recontrol.training import fit_advantage, train_value_head

base, output = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(base)

prompts = load_prompts(Path(__file__).with_name("prompts.jsonl"))
rollouts = generate_rollouts(model, tokenizer, prompts, max_new_tokens=48, temperature=0.9)
rollouts = score_rollouts(rollouts, vader)

hidden_size = model.get_output_embeddings().in_features
config = ValueHeadConfig(hidden_size, head_sizes=[1024], hook_point="lm_head", advantage_sizes=[256])
states = collect_states(model, rollouts, config)
head, figures = train_value_head(states, config)
figures |= fit_advantage(head, states)
print(figures)

model = ReControlForCausalLM.from_model(model, head, ControlConfig(method="advantage", step_size=10.0))
model.save_pretrained(output)
