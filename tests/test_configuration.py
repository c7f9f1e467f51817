"""ControlConfig and ValueHeadConfig: what they refuse, what they keep, and their round trips through JSON."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_recontrol import ControlConfig, ValueHeadConfig
from hf_recontrol.configuration import TrainingRecord
from hf_recontrol.training.stage import _shown

NOT_NUMBERS = [True, "0.5", None, [], {}, 1j, math.nan, math.inf, -math.inf]
NOT_INTS = [True, 1.0, "1", None, [1], math.nan]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("method", value) for value in ("", "Ascent", None, 1, ["ascent"], {})],
        *[("step_size", value) for value in (*NOT_NUMBERS, -0.1, (), (0.5, -1), (0.5, math.nan), [[0.5]], (True,))],
        ("step_size", np.array([])),
        ("step_size", torch.tensor([0.5, -0.5])),
        *[("num_steps", value) for value in (*NOT_INTS, -1)],
        *[("l2", value) for value in (*NOT_NUMBERS, -0.1, (0.1,))],
        *[("plausibility", value) for value in (*NOT_NUMBERS, -0.1, 1.1, (0.1,))],
    ],
)
def test_a_bad_control_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        ControlConfig(**{field: value})


@pytest.mark.parametrize("field", ["step_size", "l2", "plausibility"])
def test_an_integer_beyond_any_float_is_an_error_that_names_the_field(field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        ControlConfig(**{field: 10**400})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("hidden_size", value) for value in (*NOT_INTS, 0, -4)],
        *[("head_sizes", value) for value in (8, "88", [0], [-1], [8.0], [True], {8}, ["8"], [None])],
        *[("activation", value) for value in ("", "ReLU", None, 3, ["relu"], "sigmoid")],
        *[("num_objectives", value) for value in (*NOT_INTS, 0, -1)],
        *[("hook_point", value) for value in ("", "lm-head", None, 0)],
        *[("layer", value) for value in (True, 1.0, "-1", None, [0])],
        *[("advantage_sizes", value) for value in (8, "8", [0], [8.0])],
        *[("reward_mean", value) for value in (*[x for x in NOT_NUMBERS if x != []], [], [0.0, 1.0], [math.nan])],
        *[("reward_std", value) for value in (*[x for x in NOT_NUMBERS if x != []], 0, -1.0, [], [1.0, 1.0], [0.0])],
        *[("base_model_name_or_path", value) for value in (1, True, ["a"], b"a")],
        *[("base_model_revision", value) for value in (1, False)],
        *[("format_version", value) for value in (*NOT_INTS, 0, 2, 10**6)],
    ],
)
def test_a_bad_head_value_is_an_error_that_names_the_field(field, value):
    values = {"hidden_size": 8, "hook_point": "lm_head", field: value}
    with pytest.raises(ValueError, match=f"`{field}"):
        ValueHeadConfig(**values)
    with pytest.raises(ValueError, match=f"some/config.json: .*`{field}"):
        ValueHeadConfig.from_dict(values, source="some/config.json")


def test_an_advantage_part_away_from_the_lm_head_is_an_error():
    with pytest.raises(ValueError, match="`advantage_sizes` needs `hook_point='lm_head'`"):
        ValueHeadConfig(hidden_size=8, advantage_sizes=[])


def test_a_format_of_the_future_says_to_upgrade():
    with pytest.raises(ValueError, match=r"`format_version` is 2.*pip install -U hf_recontrol"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "format_version": 2})


def test_recommending_advantage_without_an_advantage_part_is_an_error():
    with pytest.raises(ValueError, match="advantage_sizes"):
        ValueHeadConfig(hidden_size=8, control=ControlConfig(method="advantage"))
    with pytest.raises(ValueError, match="static_vector"):
        ValueHeadConfig(hidden_size=8, control=ControlConfig(method="static"))


@pytest.mark.parametrize("control", [0.5, "ascent", [1], False])
def test_a_recommended_control_of_another_type_is_an_error(control):
    with pytest.raises(TypeError, match="`control`"):
        ValueHeadConfig(hidden_size=8, control=control)
    with pytest.raises(ValueError, match=r"here: .*`control`"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "control": control}, source="here")


def test_a_bad_value_in_the_recommended_control_names_file_and_field():
    with pytest.raises(ValueError, match=r"some/config\.json: .*`num_steps`"):
        ValueHeadConfig.from_dict({"hidden_size": 8, "control": {"num_steps": -1}}, source="some/config.json")


@pytest.mark.parametrize(("step_size", "l2"), [(1.0, 1.0), (0.5, 2.0), ((0.1, 2.0), 0.5), (1e300, 1e300)])
def test_a_penalty_that_would_make_the_edit_grow_without_bound_is_an_error(step_size, l2):
    with pytest.raises(ValueError, match=r"`step_size \* l2` must be below 1"):
        ControlConfig(step_size=step_size, l2=l2)


def test_the_penalty_is_not_read_by_the_advantage_edit():
    assert ControlConfig(method="advantage", step_size=10.0, l2=5.0).l2 == 5.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, False),
        ({"step_size": 0}, True),
        ({"step_size": (0.0, 0.0)}, True),
        ({"step_size": (0.0, 0.1)}, False),
        ({"num_steps": 0}, True),
        ({"num_steps": 0, "method": "advantage"}, False),
        ({"step_size": 0, "method": "advantage"}, True),
    ],
)
def test_identity_is_a_step_of_zero_or_an_ascent_of_no_steps(settings, expected):
    assert ControlConfig(**settings).is_identity is expected


def test_control_is_immutable_and_hashable():
    control = ControlConfig(step_size=[0.5, 1.0])
    with pytest.raises(FrozenInstanceError):
        control.step_size = 1.0
    with pytest.raises(FrozenInstanceError):
        del control.l2
    assert hash(control) == hash(ControlConfig(step_size=(0.5, 1.0)))
    assert replace(control, num_steps=1).num_steps == 1
    with pytest.raises(ValueError, match="`num_steps`"):
        replace(control, num_steps=-1)


def test_a_callers_lists_are_not_kept():
    steps, sizes = [0.5, 1.0], [4]
    control, config = ControlConfig(step_size=steps), ValueHeadConfig(hidden_size=8, head_sizes=sizes)
    steps[0], sizes[0] = 9.0, 9
    assert control.step_size == (0.5, 1.0)
    assert config.head_sizes == [4]


@pytest.mark.parametrize(
    ("step_size", "expected"),
    [
        (1, 1.0),
        (np.float32(0.5), 0.5),
        (np.array([0.5, 1.0]), (0.5, 1.0)),
        (torch.tensor(0.25), 0.25),
        (torch.tensor([0.25, 1.0]), (0.25, 1.0)),
        (range(3), (0.0, 1.0, 2.0)),
    ],
)
def test_step_sizes_may_come_as_arrays(step_size, expected):
    control = ControlConfig(step_size=step_size)
    assert control.step_size == expected
    assert control.per_row is isinstance(expected, tuple)
    assert control.largest_step_size == (max(expected) if control.per_row else expected)


def test_unknown_keys_are_named_in_a_warning_and_ignored(recontrol_warnings):
    control = ControlConfig.from_dict({"step_size": 0.25, "max_nats": 3, "colour": 1}, source="a file")
    assert control == ControlConfig(step_size=0.25)
    (message,) = recontrol_warnings
    assert "a file" in message and "max_nats" in message and "colour" in message and "step_size" not in message
    recontrol_warnings.clear()

    config = ValueHeadConfig.from_dict({"hidden_size": 8, "colour": "x", "control": {"new": 1}}, source="b file")
    assert config == ValueHeadConfig(hidden_size=8, control=ControlConfig())
    assert any("b file" in message and "colour" in message for message in recontrol_warnings)
    assert any("'new'" in message for message in recontrol_warnings)


@pytest.mark.parametrize("values", [None, [], "text", 3, [["hidden_size", 8]]])
def test_values_that_are_no_object_are_an_error_that_names_the_source(values):
    with pytest.raises(ValueError, match="here: expected a JSON object"):
        ControlConfig.from_dict(values, source="here")
    with pytest.raises(ValueError, match="here: expected a JSON object"):
        ValueHeadConfig.from_dict(values, source="here")


def test_a_config_without_hidden_size_is_no_heads():
    with pytest.raises(ValueError, match="here: no `hidden_size`"):
        ValueHeadConfig.from_dict({"head_sizes": [8]}, source="here")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"nothing", b'{"hidden_size": ' + b"1" * 5000 + b"}"],
    ids=["empty", "cut off", "binary", "deeply nested", "text", "huge integer"],
)
def test_a_file_that_is_no_json_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        ValueHeadConfig.from_json_file(path)


finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.floats(0, 1e3)


@st.composite
def controls(draw, methods=("ascent", "advantage", "static")):
    method = draw(st.sampled_from(methods))
    step_size = draw(steps | st.lists(steps, min_size=1, max_size=4))
    l2 = draw(st.floats(0, 10))
    largest = max(step_size) if isinstance(step_size, list) else step_size
    assume(method != "ascent" or largest * l2 < 1)
    return ControlConfig(method, step_size, draw(st.integers(0, 10_000)), l2, draw(st.floats(0, 1)))


@st.composite
def head_configs(draw):
    widths = st.lists(st.integers(1, 5000), max_size=4)
    hook_point = draw(st.sampled_from(["decoder_layer", "lm_head"]))
    advantage_sizes = draw(st.none() | widths) if hook_point == "lm_head" else None
    objectives = draw(st.integers(1, 3))

    def per_objective(numbers):
        return draw(numbers | st.lists(numbers, min_size=objectives, max_size=objectives))

    static_vector = hook_point == "lm_head" and draw(st.booleans())
    methods = [
        "ascent",
        *(["advantage"] if advantage_sizes is not None else []),
        *(["static"] if static_vector else []),
    ]
    return ValueHeadConfig(
        hidden_size=draw(st.integers(1, 20_000)),
        head_sizes=draw(st.none() | widths),
        activation=draw(st.sampled_from(["relu", "silu", "gelu", "tanh"])),
        num_objectives=objectives,
        hook_point=hook_point,
        layer=draw(st.integers(-100, 100)),
        advantage_sizes=advantage_sizes,
        static_vector=static_vector,
        reward_mean=per_objective(finite),
        reward_std=per_objective(st.floats(1e-9, 1e9)),
        base_model_name_or_path=draw(st.none() | st.text()),
        base_model_revision=draw(st.none() | st.text()),
        control=draw(st.none() | controls(methods)),
    )


@given(controls())
def test_control_survives_json_pickle_and_copies(control):
    assert ControlConfig.from_dict(json.loads(json.dumps(control.to_dict()))) == control
    assert pickle.loads(pickle.dumps(control)) == copy.deepcopy(control) == replace(control) == control


@given(head_configs())
def test_a_head_config_survives_its_json_file(tmp_path, config):
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), encoding="utf-8")
    loaded = ValueHeadConfig.from_json_file(path)
    assert loaded == config
    assert loaded.to_json() == config.to_json()
    assert type(loaded.control) is type(config.control)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@given(st.recursive(st.none() | st.booleans() | finite | st.text(max_size=8) | st.integers(), st.lists, max_leaves=5))
def test_no_json_value_in_a_field_gives_anything_but_a_config_or_a_value_error(value):
    for field in ControlConfig().to_dict():
        try:
            ControlConfig.from_dict({field: value})
        except ValueError as error:
            assert f"`{field}" in str(error) or "`step_size * l2`" in str(error)
    for field in ValueHeadConfig(hidden_size=8).to_dict():
        try:
            ValueHeadConfig.from_dict({"hidden_size": 8, field: value}, source="here")
        except ValueError as error:
            assert str(error).startswith("here: ") and f"`{field}" in str(error)


@pytest.mark.parametrize(
    "figures",
    [
        [],
        {},
        {"control": {}, "criterion": "reward", "prompts": 3, "figures": []},
        {"control": {}, "criterion": None, "prompts": 3, "figures": {}},
        {"control": {}, "criterion": "reward", "prompts": 3, "figures": {"reward": [0.5, 0.4]}},
        {"control": {}, "criterion": "reward", "prompts": 3, "figures": {"reward": [None, 0.4, 0.6]}},
        {"control": {}, "criterion": "reward", "prompts": 3, "figures": {"reward": [0.5, float("nan"), 0.6]}},
        {"control": {"step_size": -1}, "criterion": "reward", "prompts": 3, "figures": {}},
    ],
)
def test_figures_of_a_control_that_are_none_are_an_error_that_names_the_field(figures):
    with pytest.raises(ValueError, match=r"control_figures|step_size"):
        ValueHeadConfig(8, control_figures=figures)
    ends = {"reward": [0.5, None, 0.6]}
    ValueHeadConfig(8, control_figures={"control": {}, "criterion": "reward", "prompts": 3, "figures": ends})


def test_a_configuration_that_could_not_be_read_again_is_not_written():
    config = ValueHeadConfig(hidden_size=4, training=TrainingRecord(sampling={"tokens": list(range(100_000))}))
    with pytest.raises(ValueError, match="bytes, and 1048576 can be read again"):
        config.to_json()
    assert _shown(list(range(101))) == "101 values" and _shown([5]) == [5]
