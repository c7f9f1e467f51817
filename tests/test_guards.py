"""Guards: masked tokens, and a limit on the KL to the base, for any logits and in every family."""

from dataclasses import replace

import pytest
import torch

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.control.controller import Controller
from hf_recontrol.control.guards import AnyTokenLeft, guarded_logits, implausible_tokens

from .reference import full_inputs, reference_within
from .tiny_models import FAMILIES, prompts, tiny_head, tiny_model


def kl(logits: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    log_policy, log_base = (torch.log_softmax(x.double(), -1) for x in (logits, base))
    return torch.where(log_policy > -torch.inf, log_policy.exp() * (log_policy - log_base), 0).sum(-1)


def drawn(spread: float, change: float, rows: int = 32, seed: int = 0):
    noise = torch.Generator().manual_seed(seed)
    base = spread * torch.randn(rows, 700, generator=noise)
    return base, base + change * torch.randn(rows, 700, generator=noise)


@pytest.mark.parametrize("spread", [0.5, 3.0, 10.0])
@pytest.mark.parametrize("change", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("max_kl", [0.01, 0.2, 2.0])
def test_the_limit_is_kept_and_used_up_whatever_the_logits(spread, change, max_kl):
    base, controlled = drawn(spread, change)
    logits = guarded_logits(base, controlled, max_kl=max_kl)
    within = kl(controlled, base) <= max_kl
    assert torch.equal(logits[within], controlled[within])
    found = kl(logits, base)
    assert (found <= max_kl * 1.001).all() and (found[~within] >= 0.95 * max_kl).all()
    nothing = torch.zeros_like(base, dtype=torch.bool)
    exact = reference_within(base.double(), controlled.double(), max_kl, nothing)
    # All on one line: of two points the share of the way tells how near they are.
    shift = (controlled - base).double()
    shares = [((x - base) * shift).sum(-1) / shift.square().sum(-1) for x in (logits.double(), exact)]
    torch.testing.assert_close(*shares, rtol=0.02, atol=1e-6)


def test_logits_linear_in_the_step_give_a_smaller_step():
    base, controlled = drawn(2.0, 3.0)
    shift = controlled - base
    logits = guarded_logits(base, controlled, max_kl=0.1)
    share = ((logits - base) * shift).sum(-1, keepdim=True) / shift.square().sum(-1, keepdim=True)
    torch.testing.assert_close(logits, base + share * shift, rtol=1e-5, atol=1e-5)
    # However far it was to go at first, it ends at one place.
    for factor in (2, 20, 1000):
        further = guarded_logits(base, base + factor * shift, max_kl=0.1)
        torch.testing.assert_close(further, logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_controlled_logit_that_overflowed_is_brought_back(dtype):
    base, controlled = drawn(2.0, 3.0)
    controlled[:, 5], controlled[:, 9] = torch.inf, -torch.inf
    controlled[::2, 5] = 1e9
    logits = guarded_logits(base.to(dtype), controlled.to(dtype), max_kl=0.1)
    assert torch.isfinite(logits).all() and (kl(logits, base.to(dtype)) <= 0.15).all()


def test_constants_of_a_row_and_masked_tokens_of_the_base_change_nothing():
    base, controlled = drawn(2.0, 3.0)
    expected = torch.log_softmax(guarded_logits(base, controlled, max_kl=0.1), -1)
    shifted = torch.log_softmax(guarded_logits(base + 70, controlled - 30, max_kl=0.1), -1)
    torch.testing.assert_close(shifted, expected, rtol=1e-3, atol=1e-3)
    base[:, 7] = controlled[:, 7] = -torch.inf
    logits = guarded_logits(base, controlled, max_kl=0.1)
    assert logits[:, 7].isinf().all() and logits[:, 8:].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_many_rows_are_limited_as_each_alone(masked):
    generator = torch.Generator().manual_seed(0)
    base, change = (3 * torch.randn(3, 5, 40, generator=generator) for _ in range(2))
    change[0, 1] = 0  # rows that keep the limit, among those that break it
    change[2] *= 1e-3
    plausibility = 0.05 if masked else 0.0
    found = guarded_logits(base, base + change, plausibility, 0.05)
    rows = zip(base.reshape(-1, 40), (base + change).reshape(-1, 40), strict=True)
    alone = [guarded_logits(one, other, plausibility, 0.05) for one, other in rows]
    torch.testing.assert_close(found, torch.stack(alone).view(3, 5, 40))
    if not masked:
        assert torch.equal(found[0, 1], base[0, 1]) and torch.equal(found[2], (base + change)[2])


def test_the_mask_counts_as_distance_from_the_base():
    base, controlled = drawn(2.0, 3.0)
    masked = implausible_tokens(base, 0.2)
    logits = guarded_logits(base, controlled, 0.2, max_kl=1.0)
    assert torch.equal(logits.isinf(), masked)
    alone = kl(base.masked_fill(masked, -torch.inf), base)
    assert (alone < 1.0).any() and (alone > 1.0).any()
    assert (kl(logits, base)[alone < 1.0] <= 1.001).all()
    # Further than the limit already: the base's own distribution over what is left.
    torch.testing.assert_close(kl(logits, base)[alone > 1.0], alone[alone > 1.0])


def test_rows_without_control_lose_no_token():
    base, controlled = drawn(2.0, 3.0, rows=2)
    controlled[0] = base[0]
    acts = torch.tensor([[False], [True]])
    logits = guarded_logits(base, controlled, 0.5, max_kl=2.0, acts=acts)
    assert torch.equal(logits[0], base[0]) and logits[1].isinf().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    base, controlled = (x.to(dtype) for x in drawn(2.0, 3.0))
    logits = guarded_logits(base, controlled, max_kl=0.1)
    assert logits.dtype == dtype
    # bfloat16 rounds logits of 8 to 1/32.
    assert (kl(logits, base) <= 0.1 * (1.2 if dtype == torch.bfloat16 else 1.001)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hook_point", ["decoder_layer", "lm_head"])
def test_no_family_passes_the_limit_at_any_strength(family, hook_point):
    base, model = tiny_model(family), tiny_model(family)
    head = tiny_head(base, hook_point)
    ids = prompts(2, 6)
    control = ControlConfig(step_size=3.0, num_steps=6)
    model = ReControlForCausalLM.from_model(model, head, control)
    with torch.no_grad():
        inputs = full_inputs(model, ids)
        plain = base(**inputs).logits
        far = kl(model(**inputs).logits, plain)
        limit = float(far.median()) / 4
        for step_size in (3.0, 60.0):
            model.control = replace(control, step_size=step_size, max_kl=limit)
            assert (kl(model(**inputs).logits, plain) <= 1.001 * limit + 1e-7).all()
        model.control = replace(control, max_kl=2 * float(far.max()))
        torch.testing.assert_close(kl(model(**inputs).logits, plain), far, rtol=1e-4, atol=1e-7)
        model.control = replace(control, max_kl=0.0)
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much", True])
def test_limits_that_mean_nothing_are_errors(value):
    with pytest.raises((ValueError, TypeError), match="max_kl"):
        ControlConfig(max_kl=value)
    with pytest.raises((ValueError, TypeError), match="max_kl"):
        ControlConfig.from_dict({"max_kl": value})


def test_labels_are_refused_and_a_middle_layer_too():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="max_kl"):
        ReControlForCausalLM.from_model(model, tiny_head(model, layer=0), ControlConfig(max_kl=0.1))
    controlled = ReControlForCausalLM.from_model(model, tiny_head(model), ControlConfig(max_kl=0.1))
    ids = prompts(1, 5)
    with pytest.raises(ValueError, match="max_kl"):
        controlled(ids, labels=ids)
    assert controlled(ids).logits.isfinite().all()


def test_compiled_it_is_the_same():
    base, controlled = drawn(2.0, 3.0)
    controlled[::4] = base[::4] + 1e-3 * (controlled - base)[::4]  # these rows keep the limit
    compiled = torch.compile(guarded_logits, fullgraph=True, backend="eager")
    for plausibility in (0.0, 0.2):
        found, expected = (each(base, controlled, plausibility, 0.1) for each in (compiled, guarded_logits))
        assert torch.equal(found.isinf(), expected.isinf()) and found.isinf().any() == (plausibility > 0)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(compiled(base, controlled, 0.0, 0.1)[::4], controlled[::4])


@pytest.mark.parametrize("plausibility", [0.0, 1e-4])
def test_to_gradients_the_scale_of_an_edit_is_a_constant(plausibility):
    base, change = drawn(2.0, 3.0, rows=6)
    change = change - base
    change[0] = 0  # a row without control, whose KL is nothing but rounding
    change[1] *= 1e-3  # one within the limit

    def gradients(logits_of):
        own, moved = (x.clone().requires_grad_(True) for x in (base, base + change))
        logits = logits_of(own, moved)
        left = logits > -torch.inf
        torch.log_softmax(logits, -1).where(left, 0).square().sum().backward()
        return own.grad, moved.grad

    found = gradients(lambda own, moved: guarded_logits(own, moved, plausibility, 0.1))
    guarded = guarded_logits(base, base + change, plausibility, 0.1)
    scale = torch.ones(6, 1)
    scale[2:] = ((guarded - base) / change).nanmedian(-1, keepdim=True).values[2:]
    assert (scale[2:] < 0.99).all()

    def with_constant_scale(own, moved):
        return (own + scale * (moved - own)).masked_fill(guarded == -torch.inf, -torch.inf)

    for one, other in zip(found, gradients(with_constant_scale), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_rows_without_a_token_are_an_error_unless_they_have_ended():
    ids = torch.tensor([[5, 6, 7], [5, 6, 2]])
    scores = torch.full((2, 9), -torch.inf)
    scores[0, 3] = 0.0
    ends = [torch.tensor([2]), torch.tensor(0)[None]]
    assert AnyTokenLeft(1, 2, ends)(ids, scores) is scores
    with pytest.raises(ValueError, match="row 1"):
        AnyTokenLeft(1, 3, ends)(ids, scores)  # the prompt itself ends so
    with pytest.raises(ValueError, match="row 0"):
        AnyTokenLeft(1, 2, ends)(ids, scores.flip(0))
    assert AnyTokenLeft(2, 2, ends)(ids, scores) is scores
    with pytest.raises(ValueError, match="lower `plausibility`"):
        AnyTokenLeft(2, 2, ends)(ids, torch.full_like(scores, -torch.inf))


@pytest.mark.parametrize("method", ["ascent", "advantage", "static"])
def test_nothing_waits_for_the_device_while_its_kernels_are_recorded(method, monkeypatch):
    """As in a CUDA graph, where a wait is an error: simulated, by a CPU whose tensors cannot be looked at."""
    head = tiny_head(tiny_model("llama"), "lm_head")
    control, controller = ControlConfig(method, 1.0, num_steps=4), Controller(head)
    noise = torch.Generator().manual_seed(0)
    hidden, base = (torch.randn(2, 3, size, generator=noise, dtype=torch.float64) for size in (16, 97))

    def run():
        edited = controller.edit(hidden, control, 1.0, prepared=True)
        logits = controller.shifted(base + edited.sum(-1, keepdim=True), control, 1.0, prepared=True)
        return edited, guarded_logits(base, logits, 0.1, 0.05)

    def wait(*args):
        raise AssertionError("This would wait for the device.")

    expected = run()
    for module in ("controller", "guards"):
        monkeypatch.setattr(f"hf_recontrol.control.{module}.may_wait", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "__bool__", wait)
    monkeypatch.setattr(torch, "equal", wait)
    found = run()
    monkeypatch.undo()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-2, atol=1e-2)
