"""Responses that were sampled under a control are read under that same one, and another one, or none, is refused."""

import copy
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead
from hf_recontrol.collection.rollouts import generate_rollouts, write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.states import collect_states, write_states
from hf_recontrol.data.fingerprints import head_fingerprint
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.data.states import StateStore
from hf_recontrol.evaluation.metrics import kl_divergence
from hf_recontrol.pipelines.fit import fit
from hf_recontrol.pipelines.loading import load_as_sampled
from hf_recontrol.settings import LoadingSettings

from .conftest import make_head
from .fresh import RECONTROL, run_fresh
from .test_fit import OPTIONS
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = [f"w{i} w{i + 1}" + " w9" * (i % 3) for i in range(5, 45)]
CONTROL = ControlConfig("advantage", step_size=2.0)
SAMPLING = {"max_new_tokens": 6, "temperature": 1.0}
STATES = {"hook_point": "lm_head"}


def base():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


def head(seed=0):
    return tiny_head(base(), "lm_head", seed=seed)


def controlled(control=CONTROL, **options):
    return ReControlForCausalLM.from_model(base(), head(**options), control)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def drawn(model, control=CONTROL, prompts=PROMPTS[:8]):
    rollouts = generate_rollouts(model, tiny_tokenizer(), prompts, control=control, **SAMPLING)
    return [replace(rollout, reward=[float(i)]) for i, rollout in enumerate(rollouts)]


@pytest.fixture
def rollouts():
    return drawn(controlled())


@pytest.fixture
def folder(tmp_path):
    """Rollouts in a folder, sampled under a head that was loaded from another."""
    head().save_pretrained(tmp_path / "head")
    model = ReControlForCausalLM.from_model(base(), tmp_path / "head", CONTROL)
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), load_prompts(PROMPTS), control=CONTROL, **SAMPLING)
    label_rollouts(tmp_path / "r", [length])
    return tmp_path / "r"


def policy_directions(model, rollouts):
    """`w_y - w̄` under the policy in force, a rollout at a time."""
    weight, found = model.lm_head.weight.detach(), []
    for rollout in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
        policy = torch.softmax(logits[len(rollout.prompt_ids) - 1 : -1], -1)
        found.append(weight[rollout.completion_ids] - policy @ weight)
    return torch.cat(found)


def test_responses_know_what_they_were_sampled_under(folder):
    mark = head_fingerprint(head())
    expected = {"control": CONTROL.to_dict(), "heads": {"default": [1.0, mark]}}
    assert all(rollout.control == expected for rollout in [*drawn(controlled()), *load_rollouts(folder)])
    manifest = read_manifest(folder, "rollouts", "recontrol rollout")
    assert {name: manifest["settings"][name] for name in expected} == expected
    assert manifest["head_sources"] == {"default": {"pretrained_model_name_or_path": str(folder.parent / "head")}}


@pytest.mark.parametrize("control", [False, replace(CONTROL, step_size=0.0)], ids=["off", "nothing changes"])
def test_responses_of_the_base_were_sampled_under_none(control):
    assert all(rollout.control is None for rollout in drawn(controlled(), control))


def test_a_fingerprint_tells_heads_that_edit_otherwise_apart():
    one = head()
    others = [head(seed=1), copy.deepcopy(one), copy.deepcopy(one)]
    others[1].config = replace(one.config, activation="tanh")
    with torch.no_grad():
        others[2].state_mean[0] += 1
    marks = [head_fingerprint(other) for other in (one, *others)]
    assert len(set(marks)) == 4
    assert head_fingerprint(copy.deepcopy(one)) == marks[0]


def test_weights_of_a_block_are_those_that_are_written_down():
    model = controlled()
    model.add_value_head("other", head(seed=1))
    with model.use_control(CONTROL, {"other": 0.5}):
        (rollout, *_) = drawn(model)
    assert rollout.control["heads"] == {"other": [0.5, head_fingerprint(head(seed=1))]}
    # Read outside of it.
    states = collect_states(model, [rollout], **STATES)
    with model.use_control(CONTROL, {"other": 0.5}):
        expected = policy_directions(model, [rollout])
    torch.testing.assert_close(states.directions, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("in_force", ["another", "none", "a head of another name"])
def test_states_are_read_under_it_whatever_is_in_force(rollouts, in_force):
    model = controlled()
    expected = policy_directions(model, rollouts)
    with model.disable_control():
        assert not torch.allclose(policy_directions(model, rollouts), expected, atol=1e-2)
    if in_force == "another":
        model.control = ControlConfig(step_size=9.0)
    elif in_force == "a head of another name":
        model = controlled(seed=1)
        model.add_value_head("first", head())
    with model.use_control(False if in_force == "none" else None):
        states = collect_states(model, rollouts, **STATES)
    torch.testing.assert_close(states.directions, expected, rtol=1e-3, atol=1e-3)


def test_another_head_or_none_is_refused(rollouts, folder, tmp_path):
    mark = head_fingerprint(head())
    sampled = rf"sampled under method='advantage', step_size=2 of the head 'default' \(fingerprint {mark}, weight 1\)"
    edited = controlled()
    with torch.no_grad():
        edited.value_head.advantage_mlp.layers[0].weight.mul_(1.1)
    for model, reason in [
        (base(), "this model has no head: attach that one"),
        (controlled(seed=1), f"No head here has the fingerprint {mark}, only 'default' has "),
        (edited, f"No head here has the fingerprint {mark}"),
    ]:
        with pytest.raises(ValueError, match=f"{sampled}.*{reason}"):
            collect_states(model, rollouts, **STATES)
        with pytest.raises(ValueError, match=f"{sampled}.*{reason}"):
            write_states(tmp_path / "s", model, folder, **STATES)
    assert not (tmp_path / "s").exists()


def test_responses_of_several_controls_are_refused(rollouts):
    with pytest.raises(
        ValueError, match=r"under 2 controls \(no control; .*step_size=2 .*\): use those of each apart"
    ):
        collect_states(controlled(), [*rollouts, *drawn(controlled(), False)], **STATES)


def test_states_of_a_folder(folder, tmp_path):
    model = controlled()
    model.control = ControlConfig(step_size=9.0)
    write_states(tmp_path / "s", model, folder, **STATES)
    model.control = CONTROL
    store, rollouts = StateStore.open(tmp_path / "s"), load_rollouts(folder)
    found = store.gather("directions", torch.arange(len(store)))
    torch.testing.assert_close(found, policy_directions(model, rollouts), rtol=1e-3, atol=1e-3)
    settings = read_manifest(tmp_path / "s", "states", "recontrol states")["settings"]
    assert {"control": settings["control"], "heads": settings["heads"]} == rollouts[0].control


def test_the_kl_of_a_control_is_measured_on_its_own_responses_or_the_base_s(rollouts):
    model = controlled()
    assert kl_divergence(model, rollouts) > 0 and kl_divergence(model, drawn(model, False)) > 0
    for setting in (replace(CONTROL, step_size=1.0), False):
        with (
            model.use_control(setting),
            pytest.raises(ValueError, match=r"sampled under .*step_size=2 .*, in force is .*: set that one"),
        ):
            kl_divergence(model, rollouts)
    with pytest.raises(ValueError, match=r"in force is .* of the head 'default'"):
        kl_divergence(controlled(seed=1), rollouts)


@pytest.fixture
def base_folder(tmp_path):
    base().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_command_reads_states_under_the_head_that_the_rollouts_name(folder, base_folder, tmp_path):
    arguments = ["states", folder, "-m", base_folder, "-o", tmp_path / "s", "--device", "cpu"]
    code, out, err = run_fresh(RECONTROL, list(map(str, arguments)), os.environ, timeout=120)
    assert code == 0, out + err
    store = StateStore.open(tmp_path / "s")
    found = store.gather("directions", torch.arange(len(store)))
    torch.testing.assert_close(found, policy_directions(controlled(), load_rollouts(folder)), rtol=1e-3, atol=1e-3)


def test_the_head_of_a_folder_is_found_where_it_was_or_named(folder, base_folder, tmp_path):
    settings = LoadingSettings(device="cpu")
    assert list(load_as_sampled(base_folder, settings, folder).value_heads) == ["default"]
    shutil.move(tmp_path / "head", tmp_path / "moved")
    with pytest.raises(OSError, match=str(tmp_path / "head")):
        load_as_sampled(base_folder, settings, folder)
    assert isinstance(load_as_sampled(base_folder, settings, folder, tmp_path / "moved"), ReControlForCausalLM)
    head(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"No head here has the fingerprint .* only '{tmp_path / 'other'}' has"):
        load_as_sampled("no/model", settings, folder, tmp_path / "other")


def test_a_head_without_a_folder_must_be_named_and_the_base_s_responses_take_none(base_folder, tmp_path):
    model = controlled()
    model.add_value_head("other", head(seed=1))
    sample = partial(write_rollouts, tokenizer=tiny_tokenizer(), prompts=load_prompts(PROMPTS[:4]), **SAMPLING)
    sample(tmp_path / "r", model, control=CONTROL)
    sample(tmp_path / "plain", model)
    settings = LoadingSettings(device="cpu")
    with pytest.raises(ValueError, match=r"nobody wrote down where that head is: name it"):
        load_as_sampled(base_folder, settings, tmp_path / "r")
    assert not isinstance(load_as_sampled(base_folder, settings, tmp_path / "plain"), ReControlForCausalLM)
    head().save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match="sampled under no control: leave the head out"):
        load_as_sampled(base_folder, settings, tmp_path / "plain", tmp_path / "head")


def test_heads_that_were_mixed_are_all_loaded(base_folder, tmp_path):
    for seed in range(2):
        head(seed).save_pretrained(tmp_path / f"head{seed}")
    model = ReControlForCausalLM.from_model(base(), tmp_path / "head0", CONTROL)
    model.add_value_head("other", tmp_path / "head1")
    model.set_value_heads({"default": 0.5, "other": -1.0})
    write_rollouts(tmp_path / "r", model, tiny_tokenizer(), load_prompts(PROMPTS), control=CONTROL, **SAMPLING)
    label_rollouts(tmp_path / "r", [length])
    loaded = load_as_sampled(base_folder, LoadingSettings(device="cpu", dtype="float32"), tmp_path / "r")
    rollouts = load_rollouts(tmp_path / "r")
    states = collect_states(loaded, rollouts, **STATES)
    torch.testing.assert_close(states.directions, policy_directions(model, rollouts), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("recontrol_warnings")
def test_a_head_is_fitted_on_what_another_made(tmp_path):
    head().save_pretrained(tmp_path / "first")
    model = ReControlForCausalLM.from_model(base(), tmp_path / "first", CONTROL)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits

    def again(**changes):
        return fit(model, PROMPTS, length, tmp_path / "run", tokenizer=tiny_tokenizer(), **OPTIONS | changes)

    figures = again()
    assert model.active_control == CONTROL and list(model.value_heads) == ["default"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before), "the model stays under its own control"

    rollouts = load_rollouts(tmp_path / "run" / "rollouts")
    options = {name: OPTIONS[name] for name in ("num_samples", "max_new_tokens", "temperature")}
    expected = generate_rollouts(model, tiny_tokenizer(), PROMPTS, control=CONTROL, **options)
    assert [rollout.completion_ids for rollout in rollouts] == [rollout.completion_ids for rollout in expected]
    store = StateStore.open(tmp_path / "run" / "states")
    scaled = [replace(rollout, temperature=1.0) for rollout in rollouts]
    found = store.gather("directions", torch.arange(len(store)))
    assert not torch.allclose(found, policy_directions(model, scaled), atol=1e-3), "w̄ is at the temperature"
    states = collect_states(model, rollouts, **STATES)
    torch.testing.assert_close(found, states.directions, rtol=1e-3, atol=1e-3)

    second = ValueHead.from_pretrained(tmp_path / "run" / "head")
    record = second.config.training.control
    assert record["control"] == CONTROL.to_dict() and record["heads"] == rollouts[0].control["heads"]
    assert record["sources"] == {"default": {"pretrained_model_name_or_path": "first"}}
    card = (tmp_path / "run" / "head" / "README.md").read_text(encoding="utf-8")
    assert "responses of the base under the control of another head" in card
    assert "`ControlConfig(method='advantage', step_size=2.0" in card and "used in its place" in card
    assert "cannot hold" in (tmp_path / "run" / "fit.yaml").read_text(encoding="utf-8")
    # The recommended control is for the base alone.
    assert second.config.control is not None
    alone = ReControlForCausalLM.from_model(base(), second)
    assert 0 < kl_divergence(alone, drawn(alone, alone.control, PROMPTS[:20])) < 1

    assert again() == figures
    model.control = replace(CONTROL, step_size=1.0)
    with pytest.raises(ValueError, match=r"control\.step_size was 2\.0, is 1\.0"):
        again()
    with model.disable_control(), pytest.raises(ValueError, match=r"control was None, is False|control\.method was"):
        again()


def test_a_record_of_another_kind_is_an_error(tmp_path):
    second = make_head()
    second.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    strange = {"control": {"method": "prayer"}, "heads": {}, "sources": {}}
    none = {"control": CONTROL.to_dict(), "heads": {}, "sources": {}, "rounds": 0}
    for odd in ([], {"control": 1}, {"control": {}, "heads": []}, strange, none):
        config["training"] = {"control": odd}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"`control` must|`method` must|`rounds` must"):
            ValueHead.from_pretrained(tmp_path)
