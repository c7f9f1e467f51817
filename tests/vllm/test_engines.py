"""Which engines and models can be controlled: right, or an error when they start."""

from types import SimpleNamespace

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM

vllm = pytest.importorskip("vllm")

from hf_recontrol.integrations.vllm import processor  # noqa: E402
from hf_recontrol.integrations.vllm.arguments import recontrol_engine_args, server_command  # noqa: E402
from hf_recontrol.integrations.vllm.loader import check_engine  # noqa: E402

from ..conftest import make_head  # noqa: E402
from ..tiny_models import tiny_head, tiny_model  # noqa: E402
from .test_requests import answers, greedy, prompts  # noqa: E402

SETTINGS = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "enforce_eager": True}
# Sizes that vLLM's attention takes. The logits are soft-capped, divided, multiplied; GPT-NeoX is transformers' own.
FAMILIES = {
    "gemma2": {"head_dim": 32, "hidden_size": 64, "final_logit_softcapping": 3.0, "tie_word_embeddings": True},
    "granite": {"hidden_size": 128},
    "cohere": {"hidden_size": 128, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "hidden_size": 64},
    "opt": {"hidden_size": 128, "word_embed_proj_dim": 128},
    "gpt_neox": {"hidden_size": 128},
}
CONTROLS = [
    ControlConfig(step_size=1.0, num_steps=8),
    ControlConfig(method="advantage", step_size=1.0),
    ControlConfig(step_size=1.0, num_steps=8, max_kl=0.2),
    ControlConfig(step_size=1.0, num_steps=8, plausibility=0.2),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_say_what_our_wrapper_says(tmp_path, family):
    model = tiny_model(family, torch.float32, max_position_embeddings=64, **FAMILIES[family])
    head = tiny_head(model, "lm_head", control=CONTROLS[0])
    model.save_pretrained(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")
    requests = [(prompt, control) for control in CONTROLS for prompt in prompts(4, seed=8)]
    wrapped, ours = ReControlForCausalLM.from_model(model, head), []
    for prompt, control in requests:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 8, "control": control}
        ours.append(wrapped.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist())
    arguments = recontrol_engine_args(tmp_path / "base", {"default": tmp_path / "head"})
    engine = vllm.LLM(**arguments, **SETTINGS, skip_tokenizer_init=True)
    params = [greedy(detokenize=False, extra_args={"control": control.to_dict()}) for _, control in requests]
    assert answers(engine, [prompt for prompt, _ in requests], params) == ours


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_dtypes_are_controlled(start, dtype):
    engine = start(dtype=dtype)
    requests = prompts(8)
    controlled, base, wild = (
        answers(engine, requests, greedy(extra_args=extra))
        for extra in ({}, {"control": False}, {"control": {"step_size": 1e30}})
    )
    assert controlled != base and wild != base


def test_modes_that_cannot_be_controlled_are_refused_when_the_engine_starts(served):
    arguments = recontrol_engine_args(served.base, served.heads) | SETTINGS
    with pytest.raises(ValueError, match="LoRA"):
        vllm.LLM(**arguments, enable_lora=True)
    with pytest.raises(ValueError, match=r"`recontrol` is not supported|recontrol_engine_args"):
        vllm.LLM(**(arguments | {"logits_processors": None}))
    parallel = SimpleNamespace(enable_elastic_ep=False)
    usual = {"speculative_config": None, "lora_config": None, "parallel_config": parallel}
    check_engine(SimpleNamespace(**usual))
    for mode, words in (
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": object()}, "speculative"),
        ({"parallel_config": SimpleNamespace(enable_elastic_ep=True)}, "elastic"),
    ):
        with pytest.raises(ValueError, match=words):
            check_engine(SimpleNamespace(**(usual | mode)))


def test_where_the_second_model_runner_would_run_the_first_is_asked_for(served, monkeypatch):
    monkeypatch.setattr(processor, "HAS_TRITON", True)
    monkeypatch.setattr(processor.envs, "VLLM_USE_V2_MODEL_RUNNER", None, raising=False)
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        vllm.LLM(**(recontrol_engine_args(served.base, {"other": served.heads["polite"]}) | SETTINGS))


def test_a_model_that_is_loaded_without_control_draws_no_token(served):
    arguments = recontrol_engine_args(served.base, served.heads) | SETTINGS | {"load_format": "auto"}
    with pytest.raises(RuntimeError, match="loaded without control"):
        answers(vllm.LLM(**arguments), prompts(1), greedy())


def test_heads_that_do_not_fit_are_refused_before_anything_starts(served, tmp_path):
    narrow = make_head(hook_point="lm_head", hidden_size=32)
    narrow.save_pretrained(tmp_path / "narrow")
    layer = make_head(hidden_size=64)
    layer.save_pretrained(tmp_path / "layer")
    many = make_head(hook_point="lm_head", hidden_size=64, control=ControlConfig(step_size=[0.1, 0.2]))
    many.save_pretrained(tmp_path / "many")
    cases = {
        "decoder layer": {"default": tmp_path / "layer"},
        "different widths": {**served.heads, "narrow": tmp_path / "narrow"},
        "one number": {"default": tmp_path / "many"},
        "needs a head": {},
        "without ':'": {"a:b": served.heads["polite"]},
    }
    for words, heads in cases.items():
        with pytest.raises(ValueError, match=words):
            recontrol_engine_args(served.base, heads)
    with pytest.raises(ValueError, match="another base"):
        vllm.LLM(**recontrol_engine_args(served.base, {"default": tmp_path / "narrow"}), **SETTINGS)
    with pytest.raises(ValueError, match="advantage part"):
        recontrol_engine_args(
            served.base, {"default": tmp_path / "narrow"}, ControlConfig(method="advantage", step_size=1.0)
        )


def test_arguments_that_control_needs_cannot_be_given_twice(served):
    for argument in ("--load-format=auto", "--logits_processors", "--port"):
        with pytest.raises(ValueError, match="leave it out"):
            server_command(served.base, served.heads, None, "127.0.0.1", 1, None, [argument, "x"])


@pytest.mark.parametrize("given", [[], ["--enable_chunked_prefill"], ["--no-enable-chunked-prefill"]])
def test_on_a_cpu_prompts_are_read_whole_unless_told_otherwise(served, given):
    command = server_command(served.base, served.heads, None, "127.0.0.1", 1, None, given)
    of_chunks = [argument for argument in command if "chunked" in argument]
    assert of_chunks == (given or ["--no-enable-chunked-prefill"])
