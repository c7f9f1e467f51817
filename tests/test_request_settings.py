"""What a request may say of control: the same names and the same refusals on every server."""

from dataclasses import replace

import pytest

from hf_recontrol import ControlConfig, ValueHeadConfig
from hf_recontrol.integrations.request_settings import RequestSettings, UnknownModel

ASCENT = ControlConfig(step_size=0.3)
ADVANTAGE = ControlConfig(method="advantage", step_size=2.0)


def settings(**changes) -> RequestSettings:
    heads = {
        "default": ValueHeadConfig(8, hook_point="lm_head", control=ASCENT),
        "polite": ValueHeadConfig(8, hook_point="lm_head", advantage_sizes=[4], control=ADVANTAGE),
        "plain": ValueHeadConfig(8, hook_point="lm_head"),
    }
    return RequestSettings("org/base", heads, **changes)


def test_each_head_is_a_model_and_the_first_one_is_the_base_s():
    served = settings()
    assert served.models == ["org/base", "org/base:default", "org/base:polite", "org/base:plain"]
    assert served.read(None, {}) == served.read("org/base", {}) == (ASCENT, {"default": 1.0})
    assert served.read("org/base:polite", {}) == (ADVANTAGE, {"polite": 1.0})
    assert served.read("org/base:plain", {}) == (ControlConfig(), {"plain": 1.0})


def test_a_head_that_recommends_a_strength_for_each_prompt_cannot_be_served():
    listed = {"default": ValueHeadConfig(8, hook_point="lm_head", control=ControlConfig(step_size=[0.1, 0.2]))}
    with pytest.raises(ValueError, match="'default' recommends a `step_size` for each prompt"):
        RequestSettings("org/base", listed)
    assert RequestSettings("org/base", listed, ASCENT).read(None, {}).control == ASCENT


def test_a_request_changes_what_its_head_recommends():
    served = settings()
    assert served.read(None, {"control": {"step_size": 1}}).control == ControlConfig(step_size=1.0)
    changed = served.read("org/base:polite", {"control": {"max_kl": 0.1}}).control
    assert changed == ControlConfig(method="advantage", step_size=2.0, max_kl=0.1)
    assert served.read(None, {"control": False}) == (False, {"default": 1.0})
    mixed = served.read("org/base", {"value_heads": {"default": 1, "polite": -0.5}})
    assert mixed == (ASCENT, {"default": 1.0, "polite": -0.5})
    own = settings(control=ControlConfig(step_size=0.7))
    assert own.read(None, {"control": {"num_steps": 5}}).control == ControlConfig(step_size=0.7, num_steps=5)
    assert own.read("org/base:polite", {}).control == ADVANTAGE
    assert own.read("org/base:default", {}).control == ControlConfig(step_size=0.7)


def test_a_field_may_be_its_json_as_a_text():
    served = settings()
    asked = served.read(None, {"control": '{"step_size": 1}', "value_heads": '{"polite": -0.5}'})
    assert asked == (ControlConfig(step_size=1.0), {"polite": -0.5})
    assert served.read(None, {"control": "false"}).control is False
    assert served.read(None, {"control": "null"}) == served.read(None, {})
    for text in ("", "{", "ascent", "[" * 100_000, '"{}"', "1", "[]"):
        with pytest.raises(ValueError, match="`control` must be an object"):
            served.read(None, {"control": text})


@pytest.mark.parametrize("model", ["other", "org/base:none", "org/base:", ":polite", "org/base:polite:polite", 3])
def test_a_model_that_is_not_served_is_named_with_those_that_are(model):
    with pytest.raises(UnknownModel, match="org/base:polite"):
        settings().read(model, {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control": {"stepsize": 1}}, "stepsize"),
        ({"control": "ascent"}, "`control` must be an object"),
        ({"control": 0}, "`control` must be an object"),
        ({"control": {"step_size": [1, 2]}}, "one number"),
        ({"control": {"step_size": None}}, "one number"),
        ({"control": {"step_size": float("nan")}}, "finite"),
        ({"control": {"step_size": True}}, "finite"),
        ({"control": {"step_size": -1}}, "step_size"),
        ({"control": {"num_steps": 1e9}}, "num_steps"),
        ({"control": {"method": "advantage", "step_size": 1}}, "advantage part"),
        ({"control": {"method": ["ascent"]}}, "method"),
        ({"control": {"target": [1, 2]}}, "target"),
        ({"control": {"plausibility": 2}}, "plausibility"),
        ({"value_heads": {"rude": 1}}, "rude"),
        ({"value_heads": {}}, "weights of heads"),
        ({"value_heads": ["polite"]}, "weights of heads"),
        ({"value_heads": {"polite": "much"}}, "polite"),
        ({"value_heads": {"polite": [1, 2]}}, "polite"),
        ({"value_heads": {"polite": None}}, "polite"),
        ({"step_size": 1}, "step_size"),
    ],
)
def test_what_means_nothing_is_refused_in_words(fields, message):
    with pytest.raises(ValueError, match=message):
        settings().read(None, fields)


@pytest.mark.parametrize("name", ["", "a:b", " a"])
def test_a_head_s_name_must_fit_into_a_model_s_name(name):
    with pytest.raises(ValueError, match="head's name"):
        RequestSettings("org/base", {name: ValueHeadConfig(8)})
    with pytest.raises(ValueError, match="needs a head"):
        RequestSettings("org/base", {})


def test_another_method_needs_its_own_step_size():
    with pytest.raises(ValueError, match="step_size"):
        settings().read("org/base:polite", {"control": {"method": "ascent"}})
    assert settings().read("org/base:polite", {"control": {"method": "ascent", "step_size": 0.1}}).control == (
        ControlConfig(method="ascent", step_size=0.1)
    )


def test_what_a_control_would_not_use_is_refused():
    served = settings()
    for change in ({"num_steps": 200}, {"l2": 0.1}):
        with pytest.raises(ValueError, match=f"`{next(iter(change))}` is for `method='ascent'`"):
            served.read("org/base:polite", {"control": change})
        assert served.read("org/base:default", {"control": change}).control == replace(ASCENT, **change)
        again = {"method": "ascent", "step_size": 0.1, **change}
        assert served.read("org/base:polite", {"control": again}).control == ControlConfig(**again)
    # All of a control, as a client may keep it.
    assert served.read("org/base:polite", {"control": ADVANTAGE.to_dict()}).control == ADVANTAGE
