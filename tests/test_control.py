"""Controller.edit: the fast forms are the plain ascent, each state is edited as if it were alone, nothing is stale."""

import copy
import gc
import pickle
import re
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import hf_recontrol.control.ascent
import hf_recontrol.control.controller
import hf_recontrol.control.products
from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig
from hf_recontrol.control.controller import DEFAULT_NAME, Controller
from hf_recontrol.heads.value_head import MLP, read_values

from .conftest import make_head

ACTIVATIONS = ["relu", "silu", "gelu", "tanh"]


def plain_ascent(head, hidden, control, step_size) -> tuple[torch.Tensor, float]:
    """
    The design's ascent, word for word, by autograd: from x = (h - mean) / scale and d = 0, n steps of
    d <- d + a (grad V(x + d) - 2 l2 d); then u = scale * d. In the dtype of `hidden`; also the smallest size of a
    ReLU's input on the way.
    """
    dtype = hidden.dtype
    head = copy.deepcopy(head).to(dtype)
    smallest = [torch.inf]

    def note_input(module, args):
        smallest[0] = min(smallest[0], float(args[0].detach().abs().min()))

    if isinstance(head.value_mlp.activation, nn.ReLU):
        head.value_mlp.activation = nn.ReLU()
        head.value_mlp.activation.register_forward_pre_hook(note_input)
    x = (hidden - head.state_mean) / head.state_scale
    d = torch.zeros_like(x)
    alpha = step_size.to(dtype) if isinstance(step_size, torch.Tensor) else step_size
    for _ in range(control.num_steps):
        leaf = d.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(head.value_mlp(x + leaf).sum(), leaf)
        d = d + alpha * (gradient - 2 * control.l2 * d)
    return head.state_scale * d, smallest[0]


def edit(head, hidden, control, step_size=None, **kwargs) -> torch.Tensor:
    """u, in the dtype of `hidden`."""
    step_size = control.step_size if step_size is None else step_size
    return Controller(head).edit(hidden, control, step_size, **kwargs) - hidden


def case(
    seed=0,
    hidden_size=6,
    head_sizes=(5,),
    activation="relu",
    objectives=1,
    batch=3,
    step_size=0.3,
    num_steps=20,
    l2=0.0,
    per_row=False,
    weight_scale=0.5,
    dtype=torch.float64,
):
    """A head in float64 with its state statistics set, states, settings, and the step size as `edit` takes it."""
    head = make_head(
        seed,
        torch.float64,
        hidden_size=hidden_size,
        head_sizes=list(head_sizes),
        activation=activation,
        num_objectives=objectives,
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2 * weight_scale)
        head.state_mean.normal_()
        head.state_scale.uniform_(0.3, 3)
    states = torch.randn(batch, hidden_size, dtype=dtype) * 2
    largest = step_size
    if per_row:
        step_size = torch.rand(batch, 1, dtype=torch.float64) * step_size
        step_size[0] = largest
    return head, states, ControlConfig(step_size=largest, num_steps=num_steps, l2=l2), step_size


def require(condition) -> None:
    assert condition, "a case of no use: the plain ascent itself is not well-conditioned there"


def assert_close_to_plain(head, states, control, step_size, tolerance, assume=require):
    expected, smallest = plain_ascent(head, states.double(), control, step_size)
    assume(torch.isfinite(expected).all() and expected.abs().max() < 1e6)
    size = max(1.0, float(expected.abs().max()))
    eps = torch.finfo(states.dtype).eps
    # Within rounding of zero the ReLU's gradient may jump the other way; and an ascent with steps so long that it is
    # chaotic blows any rounding up.
    assume(smallest > 100 * size * eps)
    nudged = states.double() + 4 * eps * states.double().abs() * torch.randn(states.shape).sign()
    assume((plain_ascent(head, nudged, control, step_size)[0] - expected).abs().max() < tolerance / 10 * size)
    result = edit(head.to(states.dtype), torch.zeros_like(states) + states, control, step_size)
    error = (result.double() - expected).abs().max()
    assert error <= tolerance * size, f"off by {float(error):.2e} of {size:.2e}"


@st.composite
def cases(draw, dtype):
    l2 = draw(st.sampled_from([0.0, 0.0, 1e-6, 1e-3, 0.1, 0.6]))
    # Up to 0.95 / l2: there each step leaps over the penalty's minimum and back.
    step_size = draw(st.sampled_from([1e-3, 0.1, 0.5, 1.5]) | st.floats(0.0, 1.5))
    return case(
        seed=draw(st.integers(0, 10_000)),
        hidden_size=draw(st.integers(1, 12)),
        head_sizes=draw(
            st.lists(st.integers(1, 30), max_size=3) | st.lists(st.integers(1, 30), min_size=1, max_size=1)
        ),
        activation=draw(st.sampled_from(["relu", *ACTIVATIONS])),
        objectives=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 40)),
        step_size=step_size,
        num_steps=draw(st.integers(0, 60)),
        l2=l2,
        per_row=draw(st.booleans()),
        weight_scale=draw(st.sampled_from([0.05, 0.3, 0.8])),
        dtype=dtype,
    )


# The ascent


@settings(max_examples=200)
@given(cases(torch.float64))
def test_the_fast_ascent_is_the_plain_one_in_float64(drawn):
    assert_close_to_plain(*drawn, tolerance=1e-9, assume=assume)


@settings(max_examples=150)
@given(cases(torch.float32))
def test_the_fast_ascent_is_the_plain_one_in_float32(drawn):
    assert_close_to_plain(*drawn, tolerance=1e-4, assume=assume)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head_sizes", [(), (8,), (200,), (8, 7), (8, 7, 6), (40, 3)])
def test_every_shape_of_head_has_the_plain_ascent(head_sizes, activation, per_row):
    drawn = case(head_sizes=head_sizes, activation=activation, per_row=per_row, objectives=2, l2=0.05, batch=7)
    assert_close_to_plain(*drawn, tolerance=1e-9)


@pytest.mark.parametrize("l2", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("num_steps", [1000, 999])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_thousand_steps_are_the_plain_ascents(num_steps, l2, batch):
    drawn = case(num_steps=num_steps, step_size=0.05, l2=l2, batch=batch, head_sizes=(12,), hidden_size=8)
    assert_close_to_plain(*drawn, tolerance=1e-9)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    product=st.floats(0.5, 0.999),
    num_steps=st.integers(1, 60),
    batch=st.integers(1, 3),
    width=st.integers(1, 6),
)
def test_a_penalty_that_overshoots_its_minimum_is_the_plain_ascents(seed, product, num_steps, batch, width):
    # From step_size * l2 = 0.5 on, 1 - 2 a l2 is negative: z swings about its fixed point instead of running to it.
    drawn = case(seed, 4, (width,), batch=batch, step_size=1.0, l2=product, num_steps=num_steps, weight_scale=0.8)
    assert_close_to_plain(*drawn, tolerance=1e-9, assume=assume)


@pytest.mark.parametrize("l2", [0.0, 1e-30, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_a_faint_penalty_is_as_exact_as_any(l2, per_row, dtype, tolerance):
    head, _, control, step_size = case(step_size=0.01, num_steps=300, l2=l2, per_row=per_row, dtype=dtype)
    with torch.no_grad():
        # A straight line: every unit is on, and climbing keeps it on.
        for parameter in head.parameters():
            parameter.abs_()
    states = torch.full((3, 6), 20.0, dtype=dtype)
    assert_close_to_plain(head, states, control, step_size, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("head_sizes", [(), (5,), (5, 4), (50,)])
def test_a_row_with_step_size_zero_stays_and_the_others_move_as_ever(dtype, l2, activation, head_sizes):
    head, states, control, _ = case(head_sizes=head_sizes, activation=activation, l2=l2, batch=4)
    head, states = head.to(dtype), states.to(dtype)
    step_size = torch.tensor([[0.0], [0.3], [0.0], [0.1]])
    result = edit(head, states, control, step_size)
    assert torch.equal(result[[0, 2]], torch.zeros_like(result[[0, 2]]))
    expected, _ = plain_ascent(head, states, control, step_size)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert result[1].abs().max() > 0


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("dead_rows", [[0], [0, 1, 2]])
@pytest.mark.parametrize(
    "step_size", [0.5, torch.tensor([[0.0], [0.5], [0.0]]), torch.tensor([[1e-30], [0.5], [0.2]])]
)
def test_a_state_where_every_relu_is_dead_stays(l2, dead_rows, step_size):
    head, _, control, _ = case(l2=l2)
    with torch.no_grad():
        head.value_mlp.layers[0].weight.abs_()
        head.value_mlp.layers[0].bias.fill_(-1)
        head.state_mean.zero_()
    states = torch.full((3, 6), 5.0, dtype=torch.float64)
    states[dead_rows] = -5.0
    result = edit(head, states, control, step_size)
    assert torch.isfinite(result).all()
    assert torch.equal(result[dead_rows], torch.zeros(len(dead_rows), 6, dtype=torch.float64))
    torch.testing.assert_close(result, plain_ascent(head, states, control, step_size)[0])


def test_a_pre_activation_of_exactly_zero_has_no_gradient_as_in_autograd():
    head = ValueHead(ValueHeadConfig(hidden_size=1, head_sizes=[1]))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(1)
        head.value_mlp.layers[0].bias.zero_()
    states = torch.tensor([[0.0], [1e-30]])
    assert edit(head, states, ControlConfig(step_size=1.0, num_steps=1)).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("num_steps", [1, 2, 5, 60])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("batch", [1, 6])
def test_all_forms_of_the_relu_ascent_agree(num_steps, l2, batch, monkeypatch):
    head, states, control, step_size = case(head_sizes=(11,), num_steps=num_steps, l2=l2, batch=batch, per_row=True)
    by_flips = edit(head, states, control, step_size)
    with monkeypatch.context() as patch:
        patch.setattr(
            hf_recontrol.control.ascent,
            "_ascend_by_flips",
            lambda *arguments: hf_recontrol.control.ascent._ascend(*arguments, target=None),
        )
        dense = edit(head, states, control, step_size)
    build = hf_recontrol.control.controller.build_plan
    monkeypatch.setattr(hf_recontrol.control.controller, "build_plan", lambda *args: build(*args[:3], with_gram=False))
    direct = edit(head, states, control, step_size)
    torch.testing.assert_close(by_flips, dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(direct, dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense, plain_ascent(head, states, control, step_size)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("head_sizes", "activation", "has_gram"),
    [
        ((12,), "silu", True),
        ((13,), "silu", False),
        ((13, 3), "relu", False),
        ((24,), "relu", True),
        ((25,), "relu", False),
    ],
)
def test_the_gram_matrix_is_made_up_to_twice_the_states_width_and_four_times_for_flips(
    head_sizes, activation, has_gram
):
    head, states, control, step_size = case(hidden_size=6, head_sizes=head_sizes, activation=activation)
    controller = Controller(head)
    controller.edit(states, control, step_size)
    assert (controller._last[2].gram is not None) is has_gram
    assert_close_to_plain(head, states, control, step_size, tolerance=1e-9)


@pytest.mark.parametrize("head_sizes", [(12, 9), (10, 9, 11)])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("many_flips", [0.0, 0.1, 1.0])
def test_a_deep_ascent_that_follows_the_last_layers_flips_is_the_plain_one(
    head_sizes, batch, l2, many_flips, monkeypatch
):
    products, followed = hf_recontrol.control.products, []
    by_flips = products.of_few
    monkeypatch.setattr(products, "MANY_FLIPS", many_flips)
    monkeypatch.setattr(products, "_MANY_OTHERS", 0.0)
    monkeypatch.setattr(products, "of_few", lambda *args: followed.append(len(args[3])) or by_flips(*args))
    for seed in range(4):
        head, states, control, step_size = case(seed, head_sizes=head_sizes, num_steps=60, l2=l2, batch=batch)
        edited = edit(head, states, control, step_size)
        torch.testing.assert_close(edited, plain_ascent(head, states, control, step_size)[0], rtol=1e-9, atol=1e-9)
    # A tenth of the units of one row is less than one.
    assert (sum(followed) > 0) == (many_flips > 0) or (batch == 1 and many_flips == 0.1)


@pytest.mark.parametrize("head_sizes", [(12, 9), (10, 9, 11)])
@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize(("most_active", "many_others"), [(0.8, 0.1), (1.0, 0.0), (1.0, 1.0), (0.0, 0.1)])
def test_a_deep_ascent_of_one_row_reads_the_rows_of_active_units_and_is_the_plain_one(
    head_sizes, l2, most_active, many_others, monkeypatch
):
    products, rows_read = hf_recontrol.control.products, []
    monkeypatch.setattr(products, "_MOST_ACTIVE", most_active)
    monkeypatch.setattr(products, "_MANY_OTHERS", many_others)

    class Counted(products.Active):
        def __call__(self, left):
            product = super().__call__(left)
            rows_read.append(left.shape[1] if self._units is None else len(self._units))
            return product

    monkeypatch.setattr(products, "Active", Counted)
    monkeypatch.setattr(hf_recontrol.control.ascent, "Active", Counted)
    for seed in range(4):
        head, states, control, step_size = case(seed, head_sizes=head_sizes, num_steps=60, l2=l2, batch=1)
        edited = edit(head, states, control, step_size)
        torch.testing.assert_close(edited, plain_ascent(head, states, control, step_size)[0], rtol=1e-9, atol=1e-9)
    # Forward and first product of the backward of each layer but the last, and G.
    widths = [*head_sizes[:-1], *head_sizes[1:-1], head_sizes[0]]
    all_rows = 4 * (60 * sum(widths) - head_sizes[0])
    assert sum(rows_read) == all_rows if most_active == 0.0 else sum(rows_read) < 0.8 * all_rows


def count_steps(function) -> int:
    """How many steps were taken one by one: each looks for the units that flipped."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::nonzero")


@pytest.mark.parametrize("kind", ["plain", "a row that stays", "a NaN row"])
def test_a_straight_line_is_taken_in_one_jump(kind):
    head, _, control, _ = case(num_steps=1000, step_size=0.01)
    with torch.no_grad():
        # Every unit is on, and climbing keeps it on.
        for parameter in head.parameters():
            parameter.abs_()
    states = torch.full((3, 6), 20.0, dtype=torch.float64)
    step_size = torch.tensor([[0.01], [0.02], [0.0 if kind == "a row that stays" else 0.01]])
    if kind == "a NaN row":
        states[2] = torch.nan
    expected = plain_ascent(head, states[:2], control, step_size[:2])[0]
    torch.testing.assert_close(edit(head, states, control, step_size)[:2], expected, rtol=1e-9, atol=1e-9)
    assert 0 < count_steps(lambda: edit(head, states, control, step_size)) < 20


def test_a_path_with_few_flips_is_the_plain_one_and_jumps_between_them():
    # V climbs along x; unit 1 switches on at x = 10, and unit 2 off at x = 20.
    head = ValueHead(ValueHeadConfig(hidden_size=2, head_sizes=[3])).double()
    with torch.no_grad():
        head.value_mlp.layers[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
        head.value_mlp.layers[0].bias.copy_(torch.tensor([0.5, -10.03, 20.07]))
        head.value_mlp.layers[1].weight.copy_(torch.tensor([[1.0, 0.5, 0.25]]))
    control = ControlConfig(step_size=0.1, num_steps=1000)
    states = torch.tensor([[0.0, 1.0], [12.0, -1.0], [30.0, 0.0]], dtype=torch.float64)
    expected, smallest = plain_ascent(head, states, control, 0.1)
    assert smallest > 1e-6
    torch.testing.assert_close(edit(head, states, control), expected, rtol=1e-9, atol=1e-9)
    assert 0 < count_steps(lambda: edit(head, states[:1], control)) < 40


@pytest.mark.parametrize("shape", [(3, 6), (1, 3, 6), (3, 1, 6), (2, 3, 6), (6,), (0, 6), (2, 0, 6)])
def test_the_edit_has_the_shape_of_the_states(shape):
    head, _, control, _ = case()
    states = torch.randn(shape, dtype=torch.float64)
    result = edit(head, states, control)
    assert result.shape == shape
    rows = edit(head, states.reshape(-1, 6), control) if states.numel() else states
    torch.testing.assert_close(result.reshape(-1, 6), rows.reshape(-1, 6))


def test_states_that_are_a_strided_view_are_edited_as_their_copy():
    head, _, control, _ = case()
    states = torch.randn(6, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    torch.testing.assert_close(edit(head, states, control), edit(head, states.contiguous(), control))


def test_step_sizes_per_row_broadcast_over_positions():
    head, _, control, _ = case()
    states = torch.randn(2, 3, 6, dtype=torch.float64)
    result = edit(head, states, control, torch.tensor([0.1, 0.4], dtype=torch.float64)[:, None, None])
    for row, step_size in enumerate([0.1, 0.4]):
        torch.testing.assert_close(result[row], edit(head, states[row], control, step_size))


@pytest.mark.parametrize("head_sizes", [(), (5,), (50,), (5, 4)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("max_rows", [1, 4, 10, 11])
def test_many_rows_are_edited_in_parts_as_at_once(monkeypatch, head_sizes, per_row, max_rows):
    head, states, control, step_size = case(head_sizes=head_sizes, batch=10, per_row=per_row)
    expected = edit(head, states, control, step_size)
    monkeypatch.setattr(hf_recontrol.control.controller, "_MAX_ROWS", max_rows)
    torch.testing.assert_close(edit(head, states, control, step_size), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(cases(torch.float64))
def test_a_state_is_edited_as_if_it_were_alone(drawn):
    head, states, control, step_size = drawn
    _, smallest = plain_ascent(head, states, control, step_size)
    result = edit(head, states, control, step_size)
    assume(smallest > 1e-9 and result.abs().max() < 1e6)
    for row in range(min(5, len(states))):
        alone = step_size[row : row + 1] if isinstance(step_size, torch.Tensor) else step_size
        torch.testing.assert_close(
            edit(head, states[row : row + 1], control, alone)[0], result[row], rtol=1e-5, atol=1e-5
        )


# Rows that are not finite, edits that run away


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("whole_row", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("head_sizes", [(), (5,), (5, 4)])
def test_a_row_that_is_not_finite_passes_untouched_and_disturbs_no_other(bad, whole_row, activation, head_sizes):
    for l2 in (0.0, 0.1):
        head, states, control, step_size = case(head_sizes=head_sizes, activation=activation, l2=l2, batch=4)
        expected = Controller(head).edit(states, control, step_size)
        broken = states.clone()
        broken[1, slice(None) if whole_row else 2] = bad
        result = Controller(head).edit(broken, control, step_size)
        torch.testing.assert_close(result[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(result[1], broken[1], rtol=0, atol=0, equal_nan=True)


def test_a_row_that_is_not_finite_passes_the_advantage_edit_untouched():
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4])
    states = torch.randn(3, 6)
    states[1, 2] = torch.nan
    result = Controller(head).edit(states, ControlConfig("advantage", step_size=2.0), 2.0)
    torch.testing.assert_close(result[1], states[1], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(result[[0, 2]], states[[0, 2]] + 2.0 * head.advantage(states[[0, 2]]).detach())


@pytest.mark.parametrize("step_size", [3e38, 1e39, 1e308])
@pytest.mark.parametrize("head_sizes", [(), (7,), (7, 5)])
@pytest.mark.parametrize("target", [None, 1.0])
def test_a_step_size_beyond_the_dtype_is_told_like_any_that_is_too_large(head_sizes, step_size, target):
    head, control = make_head(head_sizes=list(head_sizes)), ControlConfig(num_steps=9, target=target)
    with pytest.raises(FloatingPointError, match="step_size"):
        Controller(head).edit(100 * torch.randn(3, 16), replace(control, step_size=step_size), step_size)


def test_a_row_that_is_not_finite_is_an_error_where_states_are_checked():
    head, states, control, step_size = case()
    states[1] = torch.nan
    with pytest.raises(FloatingPointError, match="hidden states hold NaN"):
        Controller(head).edit(states, control, step_size, check_states=True)


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_step_that_leaves_the_range_of_the_states_is_an_error_that_names_it(method, dtype):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4], static_vector=True)
    states = torch.randn(3, 6).to(dtype)
    huge = 0.9 * torch.finfo(dtype).max
    with torch.no_grad():
        head.advantage_mlp.layers[-1].bias.fill_(10)
        head.static_vector.fill_(10)
    control = ControlConfig(method, step_size=huge)
    message = re.escape(f"{method} edit left the range of {dtype}: `step_size` {huge:g}")
    with pytest.raises(FloatingPointError, match=message):
        Controller(head).edit(states, control, huge)


# Dtypes and gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_half_precision_states_are_edited_in_float32_and_come_back_as_they_were(dtype, method, head_dtype):
    head = make_head(dtype=head_dtype, hidden_size=6, hook_point="lm_head", advantage_sizes=[4], static_vector=True)
    control = ControlConfig(method, step_size=0.5, num_steps=10)
    states = torch.randn(5, 6).to(dtype)
    result = Controller(head).edit(states, control, 0.5)
    exact = Controller(head.float()).edit(states.float(), control, 0.5)
    assert result.dtype == dtype
    # Two roundings: of the edit and of the sum.
    bound = torch.finfo(dtype).eps * ((exact - states.float()).abs() + exact.abs())
    assert ((result.float() - exact).abs() <= bound).all()


def test_float64_states_are_edited_in_float64_by_a_float32_head():
    head, states, control, step_size = case()
    result = edit(head.float(), states, control, step_size)
    torch.testing.assert_close(result, plain_ascent(head, states, control, step_size)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
@pytest.mark.parametrize("kind", ["ValueHead", "subclass"])
def test_gradients_pass_the_edit_as_if_it_were_a_constant(method, kind):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4], static_vector=True)
    if kind == "subclass":
        head.__class__ = Doubled
    states = torch.randn(2, 3, 6, requires_grad=True)
    result = Controller(head).edit(states, ControlConfig(method, num_steps=5), 0.5)
    weights = torch.randn(2, 3, 6)
    (result * weights).sum().backward()
    assert torch.equal(states.grad, weights)
    assert not torch.equal(result, states)
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["ValueHead", "subclass"])
@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
def test_the_edit_is_the_same_without_gradients(mode, kind, method):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4], static_vector=True)
    if kind == "subclass":
        head.__class__ = Doubled
    states, step_size = torch.randn(3, 6), torch.tensor([[0.1], [0.2], [0.3]])
    control = ControlConfig(method, num_steps=5)
    expected = Controller(head).edit(states, control, step_size)
    with mode():
        controller = Controller(head)
        result = controller.edit(states.clone(), control, step_size.clone())
    assert torch.equal(result, expected)
    # What was prepared there serves outside too.
    assert torch.equal(controller.edit(states, control, step_size), expected)
    head.value_mlp(states).sum().backward()


def test_a_head_made_under_inference_mode_is_climbed_too():
    control = ControlConfig(num_steps=5)
    states = torch.randn(3, 16)
    with torch.inference_mode():
        head = make_head()
        result = Controller(head).edit(states, control, 0.5)
    torch.testing.assert_close(result, Controller(make_head()).edit(states, control, 0.5))


# The advantage edit


@pytest.mark.parametrize("sizes", [[], [4], [4, 7]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per_row", [False, True])
def test_the_advantage_edit_is_the_step_size_times_g(sizes, activation, per_row):
    head = make_head(
        dtype=torch.float64, hidden_size=6, hook_point="lm_head", advantage_sizes=sizes, activation=activation
    )
    head.state_mean.normal_()
    head.state_scale.uniform_(0.5, 2)
    states = torch.randn(3, 6, dtype=torch.float64)
    step_size = torch.tensor([[0.5], [0.0], [3.0]], dtype=torch.float64) if per_row else 3.0
    result = Controller(head).edit(states, ControlConfig("advantage", step_size=3.0, l2=5.0, num_steps=0), step_size)
    torch.testing.assert_close(result, (states + step_size * head.advantage(states)).detach(), rtol=1e-12, atol=1e-12)


# Heads that change


def change_in_place(head):
    with torch.no_grad():
        head.value_mlp.layers[0].weight.add_(0.3)


def take_an_optimizer_step(optimizer, **kwargs):
    def change(head):
        head(torch.randn(4, head.config.hidden_size)).sum().backward()
        optimizer(head.parameters(), lr=0.1, **kwargs).step()

    return change


def replace_a_weight(head):
    head.value_mlp.layers[0].weight = nn.Parameter(head.value_mlp.layers[0].weight.detach() + 0.3)


def replace_data(head):
    head.value_mlp.layers[0].weight.data = head.value_mlp.layers[0].weight.data + 0.3


def edit_data(head):
    """Past every version counter; no bias changes."""
    for layer in head.value_mlp.layers:
        layer.weight.data.mul_(1.5)


def replace_a_layer(head):
    head.value_mlp.layers[0] = nn.Linear(head.config.hidden_size, 12)


def load_weights(head):
    head.load_state_dict(make_head(seed=77).state_dict())


def assign_weights(head):
    head.load_state_dict(make_head(seed=77).state_dict(), assign=True)


def set_statistics(head):
    head.state_mean.add_(0.5)
    head.state_scale.mul_(2)


def round_trip(head):
    head.half().float()


def there_and_back_in_place(head):
    head.bfloat16()


CHANGES = {
    "in place": change_in_place,
    "SGD": take_an_optimizer_step(torch.optim.SGD),
    "Adam": take_an_optimizer_step(torch.optim.Adam),
    "fused Adam": take_an_optimizer_step(torch.optim.Adam, fused=True),
    "foreach AdamW": take_an_optimizer_step(torch.optim.AdamW, foreach=True),
    "replaced weight": replace_a_weight,
    "replaced data": replace_data,
    "data in place": edit_data,
    "replaced layer": replace_a_layer,
    "load_state_dict": load_weights,
    "load_state_dict assign": assign_weights,
    "statistics": set_statistics,
    "half and back": round_trip,
    "bfloat16": there_and_back_in_place,
    "init": lambda head: nn.init.normal_(head.value_mlp.layers[1].weight),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHANGES)
def test_a_head_that_changed_is_noticed(name, dtype):
    torch.manual_seed(0)
    head, control = make_head(), ControlConfig(num_steps=5)
    states = torch.randn(3, 16, dtype=dtype)
    controller = Controller(head)
    before = controller.edit(states, control, 0.5)
    CHANGES[name](head)
    after = controller.edit(states, control, 0.5)
    assert torch.equal(after, Controller(head).edit(states, control, 0.5))
    assert not torch.equal(after, before)
    # And noticed again.
    CHANGES["in place"](head)
    assert torch.equal(controller.edit(states, control, 0.5), Controller(head).edit(states, control, 0.5))


def test_an_edit_through_data_is_noticed_for_the_advantage_too():
    head, control = make_head(hook_point="lm_head", advantage_sizes=[8]), ControlConfig("advantage")
    states, controller = torch.randn(3, 16), Controller(head)
    before = controller.edit(states, control, 0.5)
    head.advantage_mlp.layers[0].weight.data.mul_(1.5)
    after = controller.edit(states, control, 0.5)
    assert torch.equal(after, Controller(head).edit(states, control, 0.5)) and not torch.equal(after, before)


def test_prepared_tensors_are_bounded_in_bytes_and_the_last_used_stay(monkeypatch):
    controller, control = Controller(make_head()), ControlConfig(num_steps=5)
    states = torch.randn(3, 16)
    for number in range(4):
        controller.add(str(number), make_head(seed=number))

    def edit(name):
        controller.edit(states, control, 0.5, {name: 1.0})
        return [names for _, _, (names,), _ in controller._plans]

    edit("0")
    (_, plan), *_ = controller._plans.values()
    tensors = [plan.gram, *(x for head in plan.heads for pair in [*head.layers, head.out] for x in pair)]
    size = sum(x.numel() * x.element_size() for x in tensors)
    assert size < plan.num_bytes < 1.2 * size + 400
    monkeypatch.setattr(hf_recontrol.control.controller, "_MAX_BYTES", 3 * plan.num_bytes)
    assert edit("1") == ["0", "1"]
    assert edit("2") == ["0", "1", "2"]
    assert edit("0") == ["1", "2", "0"], "used again"
    assert edit("3") == ["2", "0", "3"], "the least recently used one goes"
    monkeypatch.setattr(hf_recontrol.control.controller, "_MAX_BYTES", 1)
    assert edit("1") == ["1"], "what is used is kept, whatever its size"


def test_a_head_that_did_not_change_is_prepared_once(monkeypatch):
    builds = []
    build = hf_recontrol.control.controller.build_plan
    monkeypatch.setattr(
        hf_recontrol.control.controller, "build_plan", lambda *args: builds.append(args[2]) or build(*args)
    )
    controller, control = Controller(make_head()), ControlConfig(num_steps=5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float64):
        for shape in ((1, 16), (2, 3, 16)):
            controller.edit(torch.randn(shape).to(dtype), control, 0.5)
    assert builds == [torch.float32, torch.float64]


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_prepares_its_own_tensors(clone):
    head, control = make_head(), ControlConfig(num_steps=5)
    states = torch.randn(3, 16)
    controller = Controller(head)
    expected = controller.edit(states, control, 0.5)
    other = clone(controller)
    assert not other._plans and other._last is None
    assert torch.equal(other.edit(states, control, 0.5), expected)
    if other.heads[DEFAULT_NAME] is not head:
        change_in_place(other.heads[DEFAULT_NAME])
        assert not torch.equal(other.edit(states, control, 0.5), expected)
        assert torch.equal(controller.edit(states, control, 0.5), expected)


def test_what_was_prepared_is_freed_with_the_controller():
    head = make_head(hidden_size=8, head_sizes=[10])
    controller = Controller(head)
    controller.edit(torch.randn(3, 8), ControlConfig(num_steps=3), 0.5)
    gram, weight = weakref.ref(controller._last[2].gram), weakref.ref(head.value_mlp.layers[0].weight)
    assert gram() is not None
    del controller, head
    gc.collect()
    assert gram() is None and weight() is None


def test_old_preparations_are_freed_when_the_head_changes():
    controller, control = Controller(make_head()), ControlConfig(num_steps=3)
    controller.edit(torch.randn(3, 16), control, 0.5)
    old = weakref.ref(controller._last[2].gram)
    change_in_place(controller.heads[DEFAULT_NAME])
    controller.edit(torch.randn(3, 16), control, 0.5)
    gc.collect()
    assert old() is None


# Other modules


class Doubled(ValueHead):
    """Overrides forward, so the fast forms do not hold."""

    def forward(self, hidden):
        return 2 * super().forward(hidden) + hidden.tanh().sum(-1, keepdim=True)


class Rescaled(ValueHead):
    """Overrides a part of forward that the fast forms restate."""

    def scaled(self, hidden):
        return 3 * super().scaled(hidden)


class Quadratic(nn.Module):
    """V = -|h - target|², whose ascent has a closed form."""

    def __init__(self, hidden_size=16):
        super().__init__()
        self.config = ValueHeadConfig(hidden_size=hidden_size)
        self.target = nn.Parameter(torch.linspace(-1, 1, hidden_size, dtype=torch.float64))

    def forward(self, hidden):
        return -(hidden - self.target).square().sum(-1, keepdim=True)


def by_module(head, hidden, control, step_size):
    """The ascent of any module: from d = 0, d <- d + a (grad V(h + scale d) - 2 l2 d); u = scale d."""
    scale = getattr(head, "state_scale", torch.ones(1)).to(hidden.dtype)
    d = torch.zeros_like(hidden)
    for _ in range(control.num_steps):
        leaf = d.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(head(hidden + scale * leaf).sum(), leaf)
        d = d + step_size * (gradient - 2 * control.l2 * d)
    return scale * d


@pytest.mark.parametrize("cls", [Doubled, Rescaled])
@pytest.mark.parametrize("head_sizes", [(), (5,), (5, 4)])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_subclass_that_computes_something_else_is_climbed_as_it_computes(cls, head_sizes, per_row):
    head, states, control, step_size = case(head_sizes=head_sizes, activation="silu", l2=0.1, per_row=per_row)
    fast = edit(head, states, control, step_size)
    head.__class__ = cls
    result = edit(head, states, control, step_size)
    torch.testing.assert_close(result, by_module(head, states, control, step_size), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(result, fast)


class Residual(MLP):
    def forward(self, x):
        return super().forward(x) + 0.3 * x.square().sum(-1, keepdim=True)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 0.5 * x.flip(-1)[..., :1]


def exchange(head, kind):
    """Another computation behind the same weights."""
    mlp = head.value_mlp
    if kind == "mlp":
        mlp.__class__ = Residual
    elif kind == "layer":
        mlp.layers[0].__class__ = Adapted
    elif kind == "activation":
        mlp.activation = nn.Tanh()
    else:
        forward = head.forward
        head.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("kind", ["mlp", "layer", "activation", "forward"])
def test_a_head_with_an_exchanged_part_is_climbed_as_it_computes(kind):
    head, states, control, step_size = case(activation="silu", l2=0.1)
    fast = edit(head, states, control, step_size)
    exchange(head, kind)
    result = edit(head, states, control, step_size)
    torch.testing.assert_close(result, by_module(head, states, control, step_size), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(result, fast)


def test_a_module_that_was_left_in_training_mode_is_climbed_without_dropout():
    head = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64), nn.Dropout(0.5), nn.Linear(5, 1, dtype=torch.float64))
    head.config = ValueHeadConfig(6)
    states, control = torch.randn(3, 6, dtype=torch.float64), ControlConfig(num_steps=4)
    head.eval()
    expected, values = edit(head, states, control, 0.3), read_values(head, states)
    head.train()
    torch.testing.assert_close(edit(head, states, control, 0.3), expected)
    torch.testing.assert_close(read_values(head, states), values)
    assert all(part.training for part in head.modules())


@pytest.mark.parametrize("method", ["ascent", "advantage"])
def test_autocast_does_not_reach_the_edit_or_what_is_prepared_for_it(method):
    head = make_head(0, torch.float32, hidden_size=16, head_sizes=[24], hook_point="lm_head", advantage_sizes=[8])
    with torch.no_grad():
        head.advantage_mlp.layers[-1].weight.normal_()
    states, control = torch.randn(3, 16), ControlConfig(method, 0.3)
    expected = edit(head, states, control)
    controller = Controller(head)
    with torch.autocast("cpu", torch.bfloat16):
        inside = controller.edit(states, control, 0.3) - states
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(controller.edit(states, control, 0.3) - states, expected)


def test_the_fallback_is_the_fast_ascent_where_forward_is_the_same():
    class Same(ValueHead):
        def forward(self, hidden):
            return super().forward(hidden)

    head, states, control, step_size = case(l2=0.1, per_row=True)
    fast = edit(head, states, control, step_size)
    head.__class__ = Same
    torch.testing.assert_close(edit(head, states, control, step_size), fast, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_module_is_climbed(dtype):
    head = Quadratic()
    states = torch.randn(2, 3, 16).to(dtype)
    result = Controller(head).edit(states, ControlConfig(num_steps=4), 0.1)
    assert result.dtype == dtype
    # h - target shrinks by 1 - 2a with each step.
    expected = head.target + (states.double() - head.target) * 0.8**4
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * 4)


def test_a_module_without_parameters_is_climbed():
    class Towards(nn.Module):
        config = ValueHeadConfig(hidden_size=4)

        def forward(self, hidden):
            return -hidden.square().sum(-1, keepdim=True)

    states = torch.randn(3, 4)
    result = Controller(Towards()).edit(states, ControlConfig(num_steps=1), 0.25)
    torch.testing.assert_close(result, states / 2)


def test_climbing_a_module_gives_its_parameters_no_gradients():
    head = Quadratic()
    Controller(head).edit(torch.randn(3, 16), ControlConfig(num_steps=2), 0.1)
    assert head.target.grad is None and head.target.requires_grad


# torch.compile


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "one relu": {},
    "wide": {"head_sizes": (50,)},
    "linear": {"head_sizes": ()},
    "deep": {"head_sizes": (5, 4)},
    "gelu": {"activation": "gelu"},
    "silu deep": {"activation": "silu", "head_sizes": (5, 4)},
    "l2": {"l2": 0.1},
    "per row": {"per_row": True, "l2": 0.1},
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_ascent_is_the_eager_one_whatever_the_settings_become(name, warm):
    head, states, control, step_size = case(num_steps=7, **COMPILED[name])
    controller = Controller(head)
    if warm:
        controller.edit(states, control, step_size)
    compiled = torch.compile(controller.edit, backend="eager", fullgraph=True)
    for changed, factor in [(control, 1.0), (control, 0.5), (replace(control, num_steps=3, l2=0.05), 1.0)]:
        expected = Controller(head).edit(states, changed, step_size * factor)
        torch.testing.assert_close(compiled(states, changed, step_size * factor), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_advantage_edit_is_the_eager_one(warm):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4])
    controller, states = Controller(head), torch.randn(3, 6)
    if warm:
        controller.edit(states, ControlConfig("advantage"), 0.5)
    compiled = torch.compile(controller.edit, backend="eager", fullgraph=True)
    for step_size in (0.5, 2.0):
        control = ControlConfig("advantage", step_size=step_size)
        torch.testing.assert_close(compiled(states, control, step_size), controller.edit(states, control, step_size))


@pytest.mark.parametrize("name", ["in place", "Adam", "replaced weight", "load_state_dict", "statistics"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_code_notices_a_head_that_changed(name, warm):
    head, control = make_head(), ControlConfig(num_steps=5)
    states = torch.randn(3, 16)
    controller = Controller(head)
    if warm:
        controller.edit(states, control, 0.5)
    compiled = torch.compile(controller.edit, backend="eager", fullgraph=True)
    before = compiled(states, control, 0.5)
    torch.testing.assert_close(before, Controller(head).edit(states, control, 0.5))
    CHANGES[name](head)
    after = compiled(states, control, 0.5)
    torch.testing.assert_close(after, Controller(head).edit(states, control, 0.5))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0.0, -0.9, 0.9])
def test_compiled_code_and_callers_that_ask_for_it_clamp_what_is_refused_else(dtype, start):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[4])
    with torch.no_grad():
        head.advantage_mlp.layers[-1].bias.copy_(torch.tensor([10.0, 10.0, 10.0, -10.0, -10.0, -10.0]))
    # The other dtypes' largest states would be as large as no float32 head can read.
    states = torch.full((2, 6), start * (65504 if dtype == torch.float16 else 1), dtype=dtype)
    control = ControlConfig("advantage", step_size=3e38)
    compiled = torch.compile(Controller(head).edit, backend="eager", fullgraph=True)
    result = compiled(states, control, control.step_size)
    assert torch.isfinite(result).all()
    with pytest.raises(FloatingPointError):
        Controller(head).edit(states, control, control.step_size)
    torch.testing.assert_close(
        Controller(head).edit(states, control, control.step_size, clamp=True), result, rtol=0, atol=0
    )


def test_steps_that_run_away_from_a_target_are_clamped_for_callers_that_ask_for_it():
    head = make_head(hidden_size=6, hook_point="lm_head")
    states, sizes = torch.randn(2, 6), torch.tensor([[0.01], [1e20]])
    control = ControlConfig(target=3.0, step_size=1e20, num_steps=30)
    with pytest.raises(FloatingPointError):
        Controller(head).edit(states, control, sizes)
    clamped = Controller(head).edit(states, control, sizes, clamp=True)
    assert torch.isfinite(clamped).all()
    # What runs away is nobody else's: the other row is as it is alone.
    alone = Controller(head).edit(states[:1], control, 0.01, clamp=True)
    torch.testing.assert_close(clamped[:1], alone)


def test_compiled_code_leaves_a_row_that_is_not_finite_as_it_was():
    head, states, control, step_size = case()
    expected = Controller(head).edit(states, control, step_size)
    states[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1.0, 2.0])
    compiled = torch.compile(Controller(head).edit, backend="eager", fullgraph=True)
    result = compiled(states, control, step_size)
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result[1], states[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_the_widest_heads_and_states_of_256_rows():
    """16,384 wide both ways: one gigabyte of weights, another of the Gram matrix."""
    torch.manual_seed(0)
    head = ValueHead(ValueHeadConfig(16384, head_sizes=[16384]))
    states = torch.randn(256, 16384)
    control = ControlConfig(step_size=0.5, num_steps=3)
    first, last = head.value_mlp.layers
    expected = states
    with torch.no_grad():
        for _ in range(3):
            expected = expected + 0.5 * ((first(expected) > 0) * last.weight[0]) @ first.weight
    moved = expected - states
    error = (Controller(head).edit(states, control, 0.5) - expected).norm() / moved.norm()
    assert moved.norm() > 0.1 and error < 1e-3
