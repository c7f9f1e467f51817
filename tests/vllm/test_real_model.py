"""
SmolLM2 on vLLM says what it says under our wrapper. RECONTROL_TEST_BASE names its folder, RECONTROL_TEST_HEAD that of
a head with an advantage part.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_recontrol import ReControlForCausalLM, recontrol_engine_args

vllm = pytest.importorskip("vllm")

BASE = os.environ.get("RECONTROL_TEST_BASE")
HEAD = os.environ.get("RECONTROL_TEST_HEAD")
PROMPTS = Path(__file__).parents[2] / "hf_recontrol" / "pipelines" / "demo_prompts.jsonl"
TOKENS = 24
# Of float32 logits; engines add up in other orders.
ROUNDING = 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not (BASE and HEAD), reason="RECONTROL_TEST_BASE and RECONTROL_TEST_HEAD name no folders")
def test_greedy_tokens_are_our_wrapper_s_but_for_ties():
    model = ReControlForCausalLM.from_pretrained(BASE, value_head=HEAD, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()[:64]]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in texts
    ]
    engine = vllm.LLM(
        **recontrol_engine_args(BASE, {"default": HEAD}), dtype="float32", max_model_len=512, enforce_eager=True
    )
    for control in ({}, {"control": {"method": "advantage", "step_size": 5.0}}):
        params = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, extra_args=control)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        ours = model.control
        if control:
            ours = model.value_head.config.changed_control(control["control"])
        gaps = []
        for ids, output in zip(prompts, outputs, strict=True):
            drawn = list(output.outputs[0].token_ids)
            row = torch.tensor([[*ids, *drawn]])
            with torch.no_grad(), model.use_control(ours):
                logits = model(row).logits[0, len(ids) - 1 : -1]
            # Where another token is drawn than ours, how far below ours its logit is.
            gaps += (logits.amax(-1) - logits[range(len(drawn)), drawn]).tolist()
        other = [gap for gap in gaps if gap > 0]
        print(
            f"{control}: {len(other)} of {len(gaps)} tokens are not our most likely ones, by at most {max(gaps):.2g}"
        )
        assert max(gaps) <= ROUNDING
