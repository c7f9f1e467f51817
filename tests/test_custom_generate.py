"""A pushed head under plain transformers: `generate(..., custom_generate="user/head")`, without this package."""

import json

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.custom_generate import generate as custom

from .test_hub import PUSH
from .tiny_models import left_pad, prompts, tiny_head, tiny_model

# A process in which hf_recontrol cannot be imported.
WITHOUT_US = """
import json, sys, torch
sys.modules["hf_recontrol"] = None
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
found = []
for inputs, options in json.loads(sys.argv[2]):
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    torch.manual_seed(0)
    found.append(base.generate(**inputs, **options, trust_remote_code=True).tolist())
assert not any(base.lm_head._forward_pre_hooks) and not any(name.startswith("hf_recontrol.") for name in sys.modules)
print("FOUND" + json.dumps(found))
"""


def inputs_of(*rows):
    ids, mask = left_pad(list(rows))
    return {"input_ids": ids, "attention_mask": mask}


def test_a_pushed_head_gives_the_same_tokens_to_a_plain_transformers(hub, run, tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    head = tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5))
    head.save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)

    inputs = inputs_of(prompts(1, 7)[0], prompts(1, 3, seed=2)[0])
    modes = [{}, {"do_sample": True, "temperature": 0.8}, {"num_beams": 3}]
    ours = ReControlForCausalLM.from_model(model, head)
    expected = []
    for mode in modes:
        torch.manual_seed(0)
        expected.append(ours.generate(**inputs, **mode, max_new_tokens=8).tolist())
    ascent = {"method": "ascent", "step_size": 0.7, "num_steps": 8}
    expected.append(ours.generate(**inputs, control=ControlConfig(**ascent), max_new_tokens=8).tolist())
    expected.append(ours.generate(**inputs, control=False, max_new_tokens=8).tolist())
    assert len({str(tokens) for tokens in expected}) == len(expected)

    plain = {name: value.tolist() for name, value in inputs.items()}
    named = {"custom_generate": "me/head", "max_new_tokens": 8}
    calls = [mode | named for mode in modes] + [named | {"control": control} for control in (ascent, False)]
    output = run(
        WITHOUT_US,
        str(tmp_path / "base"),
        json.dumps([(plain, call) for call in calls]),
        endpoint=hub.endpoint,
        home="fresh",
    )
    assert json.loads(output.split("FOUND")[1]) == expected


@pytest.mark.parametrize("place", [("lm_head", -1), ("decoder_layer", -1)], ids=lambda place: place[0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "mamba"])
@pytest.mark.parametrize(
    "control",
    [
        ControlConfig(step_size=0.7, num_steps=8, l2=0.1),
        ControlConfig(step_size=2.0, num_steps=8, plausibility=0.3),
        ControlConfig("advantage", 1.5),
    ],
    ids=["ascent", "plausibility", "advantage"],
)
def test_the_file_draws_what_the_package_draws(family, place, control, tmp_path):
    if control.method == "advantage" and place[0] != "lm_head":
        pytest.skip("an advantage part is at the LM head")
    model = tiny_model(family)
    head = tiny_head(model, *place, head_sizes=(24, 12), activation="silu", control=control)
    head.save_pretrained(tmp_path / "head")
    found = custom.generate(model, value_head=str(tmp_path / "head"), inputs=prompts(2, 6), max_new_tokens=8)
    expected = ReControlForCausalLM.from_model(model, head).generate(prompts(2, 6), max_new_tokens=8)
    assert torch.equal(found, expected)


def test_what_cannot_be_says_why(tmp_path):
    model = tiny_model("llama")
    head = tiny_head(model, "decoder_layer", layer=1)
    head.save_pretrained(tmp_path)
    for options, message in (
        ({}, "`value_head='user/head'`"),
        ({"value_head": str(tmp_path)}, "needs hf_recontrol"),
        ({"value_head": str(tmp_path), "control": {"strength": 1}}, r"holds \['strength'\]"),
        ({"value_head": str(tmp_path), "control": {"method": "advantage"}}, "no advantage part"),
    ):
        with pytest.raises(ValueError, match=message):
            custom.generate(model, inputs=prompts(), max_new_tokens=2, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
