"""A pushed head under plain transformers: `generate(..., custom_generate="user/head")`, without this package."""

import json
import logging
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution, files, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file, save_file

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.control.controller import Controller
from hf_recontrol.custom_generate import generate as custom

from .test_hub import PUSH
from .tiny_models import left_pad, prompts, tiny_head, tiny_model

WITHOUT_US = """
import importlib.util, json, sys, torch
assert importlib.util.find_spec("hf_recontrol") is None
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


@pytest.fixture(scope="module")
def without_us(tmp_path_factory):
    """The Python of an environment in which transformers, torch, safetensors and what they need are all there is."""
    wanted, names = ["transformers", "torch", "safetensors"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in names:
            continue
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue  # needed elsewhere: on other systems
        names.add(name)
        requirements = [Requirement(text) for text in needed]
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert "hf-recontrol" not in names and "numpy" in names

    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder / "venv", symlinks=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for name in names:
        tops = {path.parts[0] for path in files(name) if path.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(distribution(name).locate_file(top)))
    return folder / "venv" / "bin" / "python"


def inputs_of(*rows):
    ids, mask = left_pad(list(rows))
    return {"input_ids": ids, "attention_mask": mask}


def test_a_pushed_head_gives_the_same_tokens_to_a_plain_transformers(hub, run, tmp_path, without_us, monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    head = tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5))
    head.save_pretrained(tmp_path / "head")
    run(PUSH, str(tmp_path / "head"), "me/head", "{}", endpoint=hub.endpoint)
    other = tiny_head(model, "lm_head", seed=7, control=ControlConfig("advantage", 1.5))
    other.save_pretrained(tmp_path / "other")
    run(PUSH, str(tmp_path / "other"), "me/head", '{"revision": "next"}', endpoint=hub.endpoint)

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
    ours = ReControlForCausalLM.from_model(ours.unload(), other)
    expected.append(ours.generate(**inputs, max_new_tokens=8).tolist())
    assert len({str(tokens) for tokens in expected}) == len(expected)

    plain = {name: value.tolist() for name, value in inputs.items()}
    named = {"custom_generate": "me/head", "max_new_tokens": 8}
    calls = [mode | named for mode in modes] + [named | {"control": control} for control in (ascent, False)]
    calls.append(named | {"revision": "next"})
    # Python finds what lies in the folder that it is started in.
    monkeypatch.chdir(tmp_path)
    output = run(
        WITHOUT_US,
        str(tmp_path / "base"),
        json.dumps([(plain, call) for call in calls]),
        endpoint=hub.endpoint,
        home="fresh",
        python=without_us,
    )
    assert json.loads(output.split("FOUND")[1]) == expected


@pytest.mark.parametrize("place", [("lm_head", -1), ("decoder_layer", -1)], ids=lambda place: place[0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "mamba"])
@pytest.mark.parametrize(
    "control",
    [
        ControlConfig(step_size=0.7, num_steps=8, l2=0.1),
        ControlConfig(step_size=2.0, num_steps=8, plausibility=0.3),
        ControlConfig("advantage", 1.5, max_kl=0.1),
        ControlConfig(step_size=2.0, num_steps=8, plausibility=0.1, max_kl=0.3),
        ControlConfig("advantage", 1.5),
        ControlConfig("static", 1.5),
        ControlConfig(step_size=0.7, num_steps=8, target=3.0),
    ],
    ids=["ascent", "plausibility", "max_kl", "both guards", "advantage", "static", "target"],
)
def test_the_file_draws_what_the_package_draws(family, place, control, tmp_path):
    if control.method != "ascent" and place[0] != "lm_head":
        pytest.skip("an advantage part and a static vector are at the LM head")
    model = tiny_model(family)
    head = tiny_head(model, *place, head_sizes=(24, 12), activation="silu", control=control)
    head.config.reward_mean, head.config.reward_std = 0.5, 2.0
    head.save_pretrained(tmp_path / "head")
    found = custom.generate(model, value_head=str(tmp_path / "head"), inputs=prompts(2, 6), max_new_tokens=8)
    expected = ReControlForCausalLM.from_model(model, head).generate(prompts(2, 6), max_new_tokens=8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
def test_autocast_does_not_reach_the_edit(method):
    model = tiny_model("llama", dtype=torch.float32)
    head = tiny_head(model, "lm_head", head_sizes=(24, 12))
    control = ControlConfig(method, 0.7, **({"num_steps": 8} if method == "ascent" else {}))
    settings = custom.DEFAULTS | {"method": method, "step_size": 0.7, "num_steps": 8}
    states = torch.randn(3, head.config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Controller(head).edit(states, control, 0.7)
        found = states + custom.edit(states, head.config.to_dict(), head.state_dict(), settings)
    assert not torch.allclose(expected, states, atol=0.1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_base_of_the_same_width_is_told_as_the_package_tells_it(tmp_path, recontrol_warnings):
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5))
    head.config = replace(head.config, base_model_name_or_path="org/trained-for", base_model_revision="a" * 40)
    head.save_pretrained(tmp_path)
    inputs = {"inputs": prompts(1, 3), "max_new_tokens": 2}
    for name, commit, told in (
        ("org/put-on", "b" * 40, "is put on 'org/put-on'"),
        ("org/trained-for", "b" * 40, f"and this is {'b' * 40}"),
        ("org/trained-for", "a" * 40, None),
        ("elsewhere/trained-for", None, None),
    ):
        model.config._name_or_path, model.config._commit_hash = name, commit
        recontrol_warnings.clear()
        ReControlForCausalLM.from_model(model, head).unload()
        expected = list(recontrol_warnings)
        assert [told in each for each in expected] == ([] if told is None else [True])
        recontrol_warnings.clear()
        for _ in range(2):  # said once
            custom.generate(model, value_head=str(tmp_path), **inputs)
        assert recontrol_warnings == expected
    # A file that anybody may have written.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": 5}))
    custom.generate(model, value_head=str(tmp_path), **inputs)


def test_guidance_is_refused_where_tokens_are_forbidden(tmp_path):
    model = tiny_model("llama")
    tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5, plausibility=0.2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`plausibility` forbids tokens"):
        custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2, guidance_scale=1.5)
    with pytest.raises(ValueError, match="paged cache"):
        custom.generate(model, value_head=str(tmp_path), inputs=prompts(), cache_implementation="paged")


def test_other_threads_on_the_same_model_are_left_alone(tmp_path):
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5, max_kl=0.5))
    head.save_pretrained(tmp_path)
    ids = prompts(2, 6)
    alone = custom.generate(model, value_head=str(tmp_path), inputs=ids, max_new_tokens=8)
    plain, logits = model.generate(ids, max_new_tokens=8), model(ids).logits

    def under(_):
        return custom.generate(model, value_head=str(tmp_path), inputs=ids, max_new_tokens=8)

    with ThreadPoolExecutor(4) as pool:
        controlled = pool.map(under, range(12))
        bases = pool.map(lambda _: (model.generate(ids, max_new_tokens=8), model(ids).logits), range(12))
        assert all(torch.equal(tokens, alone) for tokens in controlled)
        assert all(torch.equal(tokens, plain) and torch.equal(found, logits) for tokens, found in bases)


@pytest.mark.parametrize("how", ["forward", "module", "layer"])
def test_a_model_that_is_compiled_is_refused(tmp_path, how):
    model = tiny_model("llama", dtype=torch.float32)
    tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5)).save_pretrained(tmp_path)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        (model if how == "module" else model.model.layers[0]).compile(backend="eager")
    with pytest.raises(ValueError, match="compiled code may not look for hooks"):
        custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2)


def test_generate_is_asked_to_compile_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama", dtype=torch.float32)
    tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5)).save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(model, "generate", lambda **kwargs: asked.append(kwargs))
    custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2)
    custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2, control=False)
    assert [each.get("disable_compile") for each in asked] == [True, None]


def test_a_model_that_is_controlled_already_is_refused(tmp_path):
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head")
    head.save_pretrained(tmp_path)
    controlled = ReControlForCausalLM.from_model(model, head)
    with pytest.raises(ValueError, match="already"):
        custom.generate(controlled, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2)


def test_what_cannot_be_says_why(tmp_path):
    model = tiny_model("llama")
    head = tiny_head(model, "decoder_layer", layer=1)
    head.save_pretrained(tmp_path)
    for options, message in (
        ({}, "`value_head='user/head'`"),
        ({"value_head": str(tmp_path)}, "needs hf_recontrol"),
        ({"value_head": str(tmp_path), "control": {"strength": 1}}, r"holds \['strength'\]"),
        ({"value_head": str(tmp_path), "control": {"method": "advantage"}}, "no advantage part"),
        ({"value_head": str(tmp_path), "control": {"method": "static"}}, "no static vector"),
        ({"value_head": str(tmp_path), "control": {"method": "advantge"}}, "`method`"),
        ({"value_head": str(tmp_path), "control": {"step_size": -1}}, "`step_size`"),
        ({"value_head": str(tmp_path), "control": {"step_size": [1.0, 2.0]}}, "`step_size` must be one number"),
        ({"value_head": str(tmp_path), "control": {"num_steps": 10**9}}, "`num_steps`"),
        ({"value_head": str(tmp_path), "control": {"num_steps": 2.5}}, "`num_steps`"),
        ({"value_head": str(tmp_path), "control": {"plausibility": 2}}, "`plausibility`"),
        ({"value_head": str(tmp_path), "control": {"l2": float("nan")}}, "`l2`"),
        ({"value_head": str(tmp_path), "control": {"l2": 3, "step_size": 1}}, "run away"),
        ({"value_head": str(tmp_path), "control": {"target": [1.0, 2.0]}}, "`target`"),
        ({"value_head": str(tmp_path), "control": {"target": "high"}}, "`target`"),
        ({"value_head": str(tmp_path), "control": {"target": 1.0, "method": "advantage"}}, "`target`"),
    ):
        with pytest.raises(ValueError, match=message):
            custom.generate(model, inputs=prompts(), max_new_tokens=2, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "values",
    [
        {"format_version": 2},
        {"hook_point": "embeddings"},
        {"activation": "exec"},
        {"control": {"method": "ascent", "num_steps": 10**12}},
        {"control": {"step_size": None}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_configuration_from_anybody_is_checked(tmp_path, values):
    model = tiny_model("llama")
    tiny_head(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    (named,) = values.get("control", values).keys() - {"method"}
    with pytest.raises(ValueError, match=f"`{named}`"):
        custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = tiny_model("llama")
    tiny_head(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["value_mlp.layers.0.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinite"):
        custom.generate(model, value_head=str(tmp_path), inputs=prompts(), max_new_tokens=2)


@pytest.mark.parametrize("control", [{"step_size": 0.0}, {"num_steps": 0}], ids=lambda control: next(iter(control)))
def test_no_step_leaves_the_base_as_it_is(tmp_path, control):
    model = tiny_model("llama")
    tiny_head(model).save_pretrained(tmp_path)
    options = {"inputs": prompts(), "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    found = custom.generate(model, value_head=str(tmp_path), control=control | {"plausibility": 0.9}, **options)
    for one, two in zip(found.logits, model.generate(**options).logits, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("place", ["lm_head", "decoder_layer"])
def test_it_also_runs_in_inference_mode(tmp_path, place):
    model = tiny_model("llama")
    tiny_head(model, place, control=ControlConfig(step_size=0.7, num_steps=4, target=3.0)).save_pretrained(tmp_path)
    options = {"value_head": str(tmp_path), "inputs": prompts(2, 6), "max_new_tokens": 4}
    expected = custom.generate(model, **options)
    with torch.inference_mode():
        assert torch.equal(custom.generate(model, **options), expected)


def test_a_scale_that_is_not_above_zero_and_an_edit_out_of_range_are_errors(tmp_path):
    model = tiny_model("llama")
    tiny_head(model, "lm_head").save_pretrained(tmp_path)
    options = {"value_head": str(tmp_path), "inputs": prompts(), "max_new_tokens": 2}
    half = tiny_model("llama", dtype=torch.float16)
    with pytest.raises(FloatingPointError, match="too large for this head"):
        custom.generate(half, control={"method": "static", "step_size": 1e20}, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["state_scale"][0] = 0
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`state_scale`"):
        custom.generate(model, **options)


def test_another_method_needs_a_step_size_of_its_own(tmp_path):
    model = tiny_model("llama")
    tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5)).save_pretrained(tmp_path)
    options = {"value_head": str(tmp_path), "inputs": prompts(), "max_new_tokens": 2}
    with pytest.raises(ValueError, match="recommends no step size for 'ascent'"):
        custom.generate(model, control={"method": "ascent"}, **options)
    for control in ({"method": "ascent", "step_size": 0.5}, {"method": "advantage"}):
        custom.generate(model, control=control, **options)


@pytest.mark.parametrize("method", ["advantage", "static"])
def test_what_the_ascent_alone_uses_is_refused_in_the_package_s_own_words(tmp_path, method):
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head", control=ControlConfig(method, 1.5, num_steps=7))
    head.save_pretrained(tmp_path)
    options = {"value_head": str(tmp_path), "inputs": prompts(), "max_new_tokens": 2}
    for change in ({"num_steps": 5}, {"num_steps": 0}, {"l2": 0.1}):
        with pytest.raises(ValueError, match="where it changes nothing") as ours:
            head.config.changed_control(change)
        with pytest.raises(ValueError) as found:
            custom.generate(model, control=change, **options)
        assert str(found.value) == str(ours.value)
    # What asks for nothing: the defaults, and what the head has.
    for change in ({"num_steps": 30, "l2": 0.0}, {"num_steps": 7}):
        custom.generate(model, control=change, **options)


@pytest.mark.parametrize("place", ["lm_head", "decoder_layer"])
def test_guards_with_early_exit_drafts_and_hidden_states(tmp_path, place, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers.generation.utils"), "disabled", True)
    model = tiny_model("llama")
    tiny_head(model, place, control=ControlConfig(step_size=2.0, num_steps=4, max_kl=0.3)).save_pretrained(tmp_path)
    options = {"value_head": str(tmp_path), "inputs": prompts(1, 6), "max_new_tokens": 6}
    expected = custom.generate(model, **options)
    assert torch.equal(custom.generate(model, assistant_early_exit=1, **options), expected)
    found = custom.generate(model, output_hidden_states=True, return_dict_in_generate=True, **options)
    assert {len(state) for step in found.hidden_states for state in step} == {1}


def test_contrasts_of_layers_are_those_of_the_base(tmp_path):
    """What `generate` makes of the LM head alone, beside the model's forwards."""
    model, seen = tiny_model("llama"), []
    tiny_head(model, "lm_head", control=ControlConfig("advantage", 1.5, max_kl=0.3)).save_pretrained(tmp_path)

    def loop(model, input_ids, **kwargs):
        early = model(input_ids, output_hidden_states=True).hidden_states[1]
        seen.append((model.lm_head(early), torch.nn.functional.linear(early, model.lm_head.weight)))
        return input_ids

    custom.generate(model, value_head=str(tmp_path), inputs=prompts(), custom_generate=loop, max_new_tokens=2)
    assert torch.equal(*seen[0])
