"""
From prompts and a reward to a head, in a few lines of Python.

    python examples/fit.py org/base run [number of prompts]

The prompts are those of the demo. The reward is VADER's sentiment (`pip install '.[demo]'`); any function
`f(completions, **columns) -> list[float]` does, and so does the name of a reward model. Run it again after a stop: it
resumes where it stopped. Then open `run/report.html`. With all 480 prompts a model of 135 M parameters takes about ten
minutes on 2 cores.
"""

import sys
from importlib.resources import files

import torch
from transformers import AutoTokenizer, set_seed

from hf_recontrol import ReControlForCausalLM, encode_prompt, fit, load_prompts, vader

if len(sys.argv) < 3:
    sys.exit(__doc__)
base, output, *limit = sys.argv[1:]
prompts = files("hf_recontrol").joinpath("pipelines", "demo_prompts.jsonl")  # {"prompt": "Why is the sky ..."}, ...
figures = fit(
    base,
    prompts=load_prompts(str(prompts), limit=int(limit[0]) if limit else None),
    reward=vader,
    output=output,
    num_samples=2,
    max_new_tokens=48,
    temperature=0.9,
    batch_size=32,
    # VADER costs nothing, so it scores each response after every token too. 8 is a good first try with a reward model.
    prefix_every=1,
    gae_lambda=0.5,
)
print({name: value for name, value in figures.items() if isinstance(value, float)})

model = ReControlForCausalLM.from_pretrained(f"{output}/head")
tokenizer = AutoTokenizer.from_pretrained(base)
# As in training: through the chat template, or as a plain text where the base has none.
prompt = torch.tensor([encode_prompt(tokenizer, "My flight was cancelled and I am stuck at the airport.")])
sampled = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.9, "top_k": 0}
set_seed(0)
answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampled)
print(tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True))
