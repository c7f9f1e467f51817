"""Several heads on one model: a mixture is the naive sum, in every form and mode; weights follow prompts; names."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import hf_recontrol.control.ascent
import hf_recontrol.control.products
from hf_recontrol import ControlConfig, ReControlForCausalLM, ValueHead
from hf_recontrol.collection.rollouts import generate_rollouts
from hf_recontrol.control.controller import Controller
from hf_recontrol.evaluation.metrics import kl_divergence

from .conftest import make_head, make_llama
from .reference import Mixture, reference_edit, reference_generate, reference_logits
from .test_generation_modes import SMALL
from .tiny_tokenizer import tiny_tokenizer
from .versions import traces_transformers

HEADS = {
    "relu": {"head_sizes": [12]},
    "wide": {"head_sizes": [20], "num_objectives": 2},
    "deep": {"head_sizes": [7, 5]},
    "silu": {"head_sizes": [9], "activation": "silu"},
    "linear": {"head_sizes": []},
}
MIXTURES = [
    ("relu", "relu"),
    ("relu", "wide"),
    ("relu", "deep", "silu"),
    ("linear", "relu"),
    ("linear", "linear"),
    ("relu", "wide", "relu"),
]


def scaled_head(kind: str, seed: int, dtype=torch.float64, **kwargs) -> ValueHead:
    head = make_head(seed, dtype, **(HEADS[kind] | {"hook_point": "lm_head"} | kwargs))
    with torch.no_grad():
        head.state_mean.normal_()
        head.state_scale.uniform_(0.3, 3)
    return head


def heads_of(kinds, **kwargs) -> dict[str, ValueHead]:
    return {f"{kind} {seed}": scaled_head(kind, seed, **kwargs) for seed, kind in enumerate(kinds)}


def controller_of(heads: dict[str, nn.Module]) -> Controller:
    first, *others = heads.items()
    controller = Controller(first[1])
    controller.heads = dict([first, *others])
    return controller


def by_row(weights) -> dict:
    return {
        name: torch.tensor(w, dtype=torch.float64)[:, None, None] if isinstance(w, tuple) else w
        for name, w in weights.items()
    }


class Wrapped(nn.Module):
    """A head that is no plain ValueHead, so that it is climbed by autograd."""

    def __init__(self, head: ValueHead):
        super().__init__()
        self.config, self.head = head.config, head
        self.register_buffer("state_scale", head.state_scale)
        if head.config.static_vector:
            self.register_buffer("static_vector", head.static_vector)

    def forward(self, hidden):
        return self.head(hidden)

    def advantage(self, hidden):
        return self.head.advantage(hidden)


@pytest.mark.parametrize("l2", [0.0, 0.2])
@pytest.mark.parametrize("form", ["as it is", "dense", "without the Gram matrix", "autograd"])
@pytest.mark.parametrize("kinds", MIXTURES, ids=" ".join)
@pytest.mark.parametrize("rows", ["no", "yes", "some"])
def test_a_mixture_is_the_naive_sum(kinds, form, rows, l2, monkeypatch):
    heads = heads_of(kinds)
    weights = {
        name: (0.5 - i, 0.0, 1.0 + i) if rows == "yes" or (rows == "some" and i == 0) else 0.7 - 0.6 * i
        for i, name in enumerate(heads)
    }
    states = torch.randn(3, 4, 16, dtype=torch.float64)
    control = ControlConfig(step_size=0.2, num_steps=12, l2=l2)
    expected = reference_edit(Mixture(list(heads.values()), list(weights.values())), states, control)
    flips = []
    by_flips = hf_recontrol.control.ascent._ascend_by_flips
    monkeypatch.setattr(
        hf_recontrol.control.ascent, "_ascend_by_flips", lambda *args: flips.append(1) or by_flips(*args)
    )
    if form == "dense":
        dense = hf_recontrol.control.ascent._ascend
        monkeypatch.setattr(hf_recontrol.control.ascent, "_ascend_by_flips", lambda *args: dense(*args, target=None))
    elif form == "without the Gram matrix":
        build = hf_recontrol.control.controller.build_plan
        monkeypatch.setattr(
            hf_recontrol.control.controller, "build_plan", lambda *args: build(*args[:3], with_gram=False)
        )
    elif form == "autograd":
        heads = {name: Wrapped(head) if i == 0 else head for i, (name, head) in enumerate(heads.items())}
    edited = controller_of(heads).edit(states, control, 0.2, by_row(weights))
    torch.testing.assert_close(edited - states, expected, rtol=1e-9, atol=1e-9)
    should_flip = form == "as it is" and set(kinds) <= {"relu", "wide", "linear"} and set(kinds) != {"linear"}
    assert bool(flips) == should_flip


@pytest.mark.parametrize("method", ["advantage", "static"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mixture_in_closed_form_is_a_sum(wrapped, method):
    heads = heads_of(["relu", "linear", "silu"], advantage_sizes=[6], static_vector=True)
    weights = {name: (0.5 - i, 1.0, 0.0) for i, name in enumerate(heads)}
    states = torch.randn(3, 2, 16, dtype=torch.float64)
    control = ControlConfig(method, 0.4)
    expected = reference_edit(Mixture(list(heads.values()), list(weights.values())), states, control)
    if wrapped:
        heads = {name: Wrapped(head) for name, head in heads.items()}
    edited = controller_of(heads).edit(states, control, 0.4, by_row(weights))
    torch.testing.assert_close(edited - states, expected, rtol=1e-12, atol=1e-12)


def test_one_head_of_several_is_that_head_bit_for_bit():
    heads = heads_of(["relu", "wide"], dtype=torch.float32)
    states, control = torch.randn(3, 16), ControlConfig(step_size=0.3, num_steps=20)
    for name, head in heads.items():
        alone = Controller(head).edit(states, control, 0.3)
        assert torch.equal(controller_of(heads).edit(states, control, 0.3, {name: 1.0}), alone)


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_target_is_approached_as_by_plain_gradient_descent(kind, wrapped, per_row, l2):
    objectives = 3
    head = scaled_head(kind, 3, num_objectives=objectives, reward_mean=[0.0, 1.0, -2.0], reward_std=[1.0, 2.0, 0.5])
    control = ControlConfig(
        step_size=[0.01, 0.02, 0.005] if per_row else 0.01, num_steps=25, l2=l2, target=[1.0, 0.5, -2.0]
    )
    states = torch.randn(3, 2, 16, dtype=torch.float64)
    expected = reference_edit(Mixture([head], [1.0]), states, control)
    step_size = torch.tensor(control.step_size, dtype=torch.float64)[:, None, None] if per_row else 0.01
    edited = Controller(Wrapped(head) if wrapped else head).edit(states, control, step_size)
    torch.testing.assert_close(edited - states, expected, rtol=1e-7, atol=1e-9)
    before, after = (head.rewards(head(x)) - torch.tensor(control.target) for x in (states, edited))
    assert after.square().sum() < before.square().sum()


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("objectives", [1, 3])
@pytest.mark.parametrize("many_flips", [0.0, 0.1, 1.0])
def test_a_target_is_approached_by_flips_as_by_dense_steps(objectives, rows, per_row, l2, many_flips, monkeypatch):
    ascent = hf_recontrol.control.ascent
    head = scaled_head("wide", 3, num_objectives=objectives)
    control = ControlConfig(num_steps=60, l2=l2, target=[1.5, -0.5, 1.0][:objectives])
    step_size = torch.linspace(0.01, 0.03, rows, dtype=torch.float64)[:, None] if per_row else 0.02
    states = 2 * torch.randn(rows, 16, dtype=torch.float64)
    products = hf_recontrol.control.products
    followed, dense, by_flips = [], ascent._ascend, products.of_few
    monkeypatch.setattr(products, "MANY_FLIPS", many_flips)
    monkeypatch.setattr(products, "of_few", lambda *args: followed.append(len(args[3])) or by_flips(*args))
    edited = Controller(head).edit(states, control, step_size)
    assert (sum(followed) > 2) == (many_flips > 0)
    monkeypatch.setattr(ascent, "_approach_by_flips", dense)
    torch.testing.assert_close(edited, Controller(head).edit(states, control, step_size), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [-1, 1])
def test_a_mixture_on_a_layer_equals_the_reference(layer, input_ids):
    where = {"hook_point": "decoder_layer", "layer": layer}
    heads = [scaled_head(kind, seed, **where) for seed, kind in ((1, "relu"), (2, "wide"))]
    control, weights = ControlConfig(step_size=0.3, num_steps=10), {"default": 0.6, "other": -0.8}
    model = ReControlForCausalLM.from_model(make_llama(dtype=torch.float64), heads[0], control)
    model.add_value_head("other", heads[1])
    mixture = Mixture(heads, list(weights.values()))
    expected = reference_generate(make_llama(dtype=torch.float64), mixture, input_ids, control=control)
    found = model.generate(input_ids, value_heads=weights, **GREEDY)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(input_ids, **GREEDY))


def test_a_linear_head_reaches_its_target_whatever_the_number_of_steps():
    head = scaled_head("linear", 3, num_objectives=2)
    weight = head.value_mlp.layers[0].weight
    step_size = 1 / float(torch.linalg.matrix_norm(weight.detach(), 2)) ** 2
    control = ControlConfig(step_size=step_size, num_steps=3000, target=(0.7, -0.3))
    states = torch.randn(4, 16, dtype=torch.float64)
    edited = Controller(head).edit(states, control, step_size)
    torch.testing.assert_close(head(edited), torch.tensor([[0.7, -0.3]] * 4, dtype=torch.float64))


def two_headed(**control) -> tuple[ReControlForCausalLM, list[ValueHead]]:
    """A tiny Llama in float64 with the heads `default` and `other`."""
    heads = [
        scaled_head("relu", 1, advantage_sizes=[6], static_vector=True),
        scaled_head("wide", 2, advantage_sizes=[5], static_vector=True),
    ]
    settings = {"step_size": 0.3, "num_steps": 10} | control
    model = ReControlForCausalLM.from_model(make_llama(dtype=torch.float64), heads[0], ControlConfig(**settings))
    model.add_value_head("other", heads[1])
    return model, heads


BY_ROW = ControlConfig(step_size=(0.3, 0.1))
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize(
    "control", [{}, {"method": "advantage"}, {"method": "static"}, {"plausibility": 0.05}], ids=str
)
def test_generation_with_a_mixture_equals_the_reference(control, input_ids):
    model, heads = two_headed(**control)
    weights = {"default": 0.6, "other": -0.8}
    expected = reference_generate(
        make_llama(dtype=torch.float64), Mixture(heads, list(weights.values())), input_ids, control=model.control
    )
    alone = model.generate(input_ids, **GREEDY)
    assert torch.equal(model.generate(input_ids, value_heads=weights, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids, **GREEDY), alone), "a call's weights are that call's"
    model.set_value_heads(weights)
    assert torch.equal(model.generate(input_ids, **GREEDY), expected)
    assert not torch.equal(expected, alone)
    logits = reference_logits(
        make_llama(dtype=torch.float64), Mixture(heads, list(weights.values())), input_ids, control=model.control
    )
    torch.testing.assert_close(model(input_ids).logits, logits)


@pytest.mark.parametrize("plausibility", [0.0, 0.05])
def test_each_row_has_its_own_weights(input_ids, plausibility):
    model, _ = two_headed(plausibility=plausibility)
    rows = [(1.0, 0.0), (-0.5, 1.5), (0.0, 0.0)]
    prompts = torch.cat([input_ids, input_ids[:1].flip(1)])
    expected = torch.cat(
        [
            model.generate(prompts[i : i + 1], value_heads=dict(zip(("default", "other"), row, strict=True)), **GREEDY)
            for i, row in enumerate(rows)
        ]
    )
    default, other = zip(*rows, strict=True)
    mixed = model.generate(prompts, value_heads={"default": default, "other": list(other)}, **GREEDY)
    assert torch.equal(mixed, expected)
    assert torch.equal(mixed[2:], model.generate(prompts[2:], control=False, **GREEDY))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_weights_by_row_follow_beams(input_ids, options):
    model, _ = two_headed()
    mixed = model.generate(input_ids, value_heads={"default": (1, 0), "other": (0, 1)}, **GREEDY, **options)
    single = [
        model.generate(input_ids[i : i + 1], value_heads={name: 1}, **GREEDY, **options)
        for i, name in enumerate(("default", "other"))
    ]
    assert torch.equal(mixed, torch.cat(single))


def test_weights_that_are_not_one_for_each_prompt_are_refused(input_ids):
    model, _ = two_headed()
    with pytest.raises(ValueError, match=r"weight of 'other'.* 3 values for 2 prompts"):
        model.generate(input_ids, value_heads={"default": 1.0, "other": (1, 2, 3)}, **GREEDY)
    with pytest.raises(ValueError, match="weight of 'other'"):
        model.generate_batch([[1, 5]], value_heads={"other": (1, 2)})


def test_no_weight_at_all_is_the_base(input_ids):
    model, _ = two_headed()
    base = make_llama(dtype=torch.float64)
    for weights in ({}, {"default": 0}, {"default": (0, 0), "other": 0.0}):
        assert torch.equal(
            model.generate(input_ids, value_heads=weights, **GREEDY), base.generate(input_ids, **GREEDY)
        )
        model.set_value_heads(weights)
        assert torch.equal(model(input_ids).logits, base(input_ids).logits)


def test_threads_mix_as_they_are_told(input_ids):
    model, _ = two_headed()
    mixtures = [{"default": 1.0}, {"other": 1.0}, {"default": 0.5, "other": -0.5}, {}]
    expected = [model.generate(input_ids, value_heads=weights, **GREEDY) for weights in mixtures]
    found: list = [[] for _ in mixtures]

    def work(number):
        for _ in range(4):
            found[number].append(model.generate(input_ids, value_heads=mixtures[number], **GREEDY))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(mixtures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(x) == 4 and all(torch.equal(y, e) for y in x) for x, e in zip(found, expected, strict=True))


@traces_transformers
@pytest.mark.parametrize("weights", [{"default": 0.6, "other": -0.8}, {"other": (0.5, 1.0)}], ids=str)
@pytest.mark.parametrize("control", [{}, {"method": "advantage"}, {"method": "static"}], ids=str)
def test_a_mixture_compiles_whole(input_ids, weights, control):
    model, _ = two_headed(**control)
    model.set_value_heads(weights)
    with torch.no_grad():
        expected = model(input_ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(input_ids).logits, expected)


def test_continuous_batching_mixes(input_ids):
    model, _ = two_headed()
    model = model.to(torch.float32)
    weights = {"default": 0.6, "other": -0.8}
    expected = model.generate(input_ids, value_heads=weights, **GREEDY)[:, input_ids.shape[1] :].tolist()
    assert expected != model.generate(input_ids, **GREEDY)[:, input_ids.shape[1] :].tolist()
    from transformers import GenerationConfig

    # Seconds less than the default cache, which takes all of the memory.
    found = model.generate_batch(
        input_ids.tolist(),
        generation_config=GenerationConfig(eos_token_id=-1, **GREEDY),
        continuous_batching_config=SMALL,
        value_heads=weights,
    )
    assert [result.generated_tokens for result in found.values()] == expected


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_mixes_on_its_own(clone, input_ids):
    model, _ = two_headed()
    model.set_value_heads({"default": 0.6, "other": -0.8})
    expected = model.generate(input_ids, **GREEDY)
    other = clone(model)
    assert torch.equal(other.generate(input_ids, **GREEDY), expected)
    other.set_value_heads({"default": 1.0})
    other.delete_value_head("other")
    assert list(model.value_heads) == ["default", "other"] and list(other.value_heads) == ["default"]
    assert torch.equal(model.generate(input_ids, **GREEDY), expected)


def test_heads_come_and_go_by_name(input_ids, tmp_path):
    model, heads = two_headed()
    alone = model.generate(input_ids, **GREEDY)
    assert model.value_head is heads[0], "only one has a weight"
    heads[1].save_pretrained(tmp_path / "several" / "inside")
    model.add_value_head("third", tmp_path / "several", subfolder="inside")
    assert list(model.value_heads) == ["default", "other", "third"]
    assert torch.equal(model.generate(input_ids, **GREEDY), alone), "a new head has no weight"
    both = model.generate(input_ids, value_heads={"other": 1.0}, **GREEDY)
    assert torch.equal(model.generate(input_ids, value_heads={"third": 1.0}, **GREEDY), both)
    model.set_value_heads({"third": 1.0, "default": 0.0})
    assert dict(model.value_head_weights) == {"third": 1.0, "default": 0.0}
    with pytest.raises(ValueError, match="has a weight"):
        model.delete_value_head("third")
    model.delete_value_head("default")
    model.delete_value_head("other")
    model.set_value_heads({})
    with pytest.raises(ValueError, match="last head"):
        model.delete_value_head("third")
    model.set_value_heads({"third": 1.0})
    assert list(model.value_heads) == ["third"] and dict(model.value_head_weights) == {"third": 1.0}
    assert torch.equal(model.generate(input_ids, **GREEDY), both)
    base = model.unload()
    assert torch.equal(
        base.generate(input_ids, **GREEDY), make_llama(dtype=torch.float64).generate(input_ids, **GREEDY)
    )


@pytest.mark.parametrize(
    ("name", "head", "options", "error", "message"),
    [
        ("default", {}, {}, ValueError, "already"),
        ("Default", {}, {}, ValueError, "already"),
        *(
            (name, {}, {}, ValueError, "up to 64 letters")
            for name in ("", 3, "..", ".", "a/b", "/tmp/x", "a\0b", "a" * 65)
        ),
        ("new", {"hidden_size": 8}, {}, ValueError, "width 8"),
        ("new", {"hook_point": "decoder_layer"}, {}, ValueError, "share a hook point"),
        ("new", {"hook_point": "decoder_layer", "layer": 9}, {}, ValueError, "layer 9"),
        ("new", {}, {"subfolder": "x"}, TypeError, "subfolder"),
        ("new", None, {}, TypeError, "ValueHead"),
        ("new", "nowhere/at/all", {}, OSError, "nowhere"),
    ],
)
def test_a_head_that_cannot_be_added_changes_nothing(name, head, options, error, message):
    model, _ = two_headed()
    given = make_head(**({"hook_point": "lm_head"} | head)) if isinstance(head, dict) else head
    with pytest.raises(error, match=message):
        model.add_value_head(name, given, **options)
    assert list(model.value_heads) == ["default", "other"]


@pytest.mark.parametrize(
    ("weights", "control", "error", "message"),
    [
        ({"nobody": 1.0}, {}, ValueError, "no head"),
        ({"default": float("nan")}, {}, ValueError, "finite"),
        ({"default": "much"}, {}, ValueError, "finite"),
        ({"default": ()}, {}, ValueError, "each prompt"),
        ({"default": b"ab"}, {}, ValueError, "finite"),
        ({3: 1.0, "default": 1.0}, {}, TypeError, "strings"),
        (["default"], {}, TypeError, "dict"),
        ({"default": 1.0, "plain": 1.0}, {"method": "advantage"}, ValueError, "advantage part"),
        ({"default": 1.0, "idle": 1.0}, {}, ValueError, "do nothing"),
        ({"default": 1.0, "plain": 1.0}, {"target": 1.0}, ValueError, "one head"),
        ({"default": (1.0, -0.5)}, {"target": 1.0}, ValueError, "0 or more"),
    ],
)
def test_weights_that_cannot_be_are_refused_and_the_old_ones_stay(weights, control, error, message, input_ids):
    model, _ = two_headed(**control)
    model.add_value_head("plain", make_head(hook_point="lm_head", dtype=torch.float64))
    idle = make_head(hook_point="lm_head", dtype=torch.float64)
    torch.nn.init.zeros_(idle.value_mlp.layers[-1].weight)
    model.add_value_head("idle", idle)
    before = model.generate(input_ids, **GREEDY)
    with pytest.raises(error, match=message):
        model.set_value_heads(weights)
    assert dict(model.value_head_weights) == {"default": 1.0}
    assert torch.equal(model.generate(input_ids, **GREEDY), before)
    with pytest.raises(error, match=message):
        model.generate(input_ids, value_heads=weights, **GREEDY)
    assert torch.equal(model.generate(input_ids, **GREEDY), before)


def test_a_control_that_one_of_the_heads_cannot_do_is_refused(input_ids):
    model, _ = two_headed()
    model.add_value_head("plain", make_head(hook_point="lm_head", dtype=torch.float64))
    model.set_value_heads({"default": 1.0, "plain": 0.5})
    for setting in (ControlConfig("advantage"), ControlConfig(target=1.0), False):
        with pytest.raises((ValueError, TypeError)):
            model.control = setting
    with pytest.raises(ValueError, match="advantage part"):
        model.generate(input_ids, control=ControlConfig("advantage"), **GREEDY)
    model.generate(input_ids, control=ControlConfig("advantage"), value_heads={"other": 1.0}, **GREEDY)


def test_where_several_heads_could_be_meant_one_must_be_named(input_ids, tmp_path):
    model, heads = two_headed()
    model.set_value_heads({"default": 1.0, "other": 1.0})
    for ask in (
        lambda: model.value_head,
        lambda: model.values(input_ids),
        lambda: model.save_pretrained(tmp_path / "none"),
        lambda: model.push_to_hub("user/none"),
    ):
        with pytest.raises(ValueError, match=r"several heads, \['default', 'other'\]"):
            ask()
    assert not (tmp_path / "none").exists()
    assert model.values(input_ids, value_head="other").shape == (2, 4, 2)
    model.save_pretrained(tmp_path / "other", value_head="other")
    saved = ValueHead.from_pretrained(tmp_path / "other")
    assert all(torch.equal(saved.state_dict()[k], v) for k, v in heads[1].state_dict().items())
    with pytest.raises(ValueError, match="no head"):
        model.save_pretrained(tmp_path / "none", value_head="nobody")


def test_a_checkpoint_of_the_base_holds_all_heads(tmp_path):
    model, heads = two_headed(target=0.25)
    heads[1].config.control = ControlConfig("advantage", 7.0)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    for name, control in (("default", model.control), ("other", ControlConfig("advantage", 7.0))):
        assert ValueHead.from_pretrained(tmp_path / "value_head" / name).config.control == control
    for name, head in zip(("default", "other"), heads, strict=True):
        saved = ValueHead.from_pretrained(tmp_path / "value_head" / name)
        assert all(torch.equal(saved.state_dict()[k], v) for k, v in head.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "high"}, "finite number"),
        ({"target": []}, "each objective"),
        ({"target": [float("inf")]}, "finite number"),
        ({"target": 1.0, "method": "advantage"}, "ascent"),
    ],
)
def test_targets_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ControlConfig(**settings)


def test_a_target_needs_one_value_for_each_objective(input_ids):
    model, _ = two_headed()
    with pytest.raises(ValueError, match="2 values, this head has 1 objectives"):
        model.generate(input_ids, control=ControlConfig(target=[1.0, 2.0]), **GREEDY)


def test_a_target_travels_with_the_head(input_ids, tmp_path):
    model, _ = two_headed(target=0.25)
    model.save_pretrained(tmp_path, value_head="default")
    again = ReControlForCausalLM.from_model(make_llama(dtype=torch.float64), tmp_path)
    assert again.control == model.control and again.control.target == 0.25
    assert torch.equal(again.generate(input_ids, **GREEDY), model.generate(input_ids, **GREEDY))


def test_settings_of_a_mixture_are_no_heads_recommendation(tmp_path):
    model, heads = two_headed()
    for weights in ({"default": 1.0, "other": 1.0}, {"default": 0.5}, {"default": (1.0, 1.0)}):
        model.set_value_heads(weights)
        model.save_pretrained(tmp_path, value_head="default")
        assert ValueHead.from_pretrained(tmp_path).config.control is None and heads[0].config.control is None


@pytest.mark.parametrize("head_sizes", [[], [12]], ids=["linear", "relu"])
def test_steps_that_run_away_from_their_target_are_an_error(head_sizes, input_ids):
    head = scaled_head("relu", 1, head_sizes=head_sizes, num_objectives=2)
    control = ControlConfig(step_size=10.0, target=[1.0, 1.0])
    error, message = (FloatingPointError, "too large") if head_sizes else (ValueError, "take one below ([0-9.]+)")
    with pytest.raises(error, match=message) as raised:
        model = ReControlForCausalLM.from_model(make_llama(dtype=torch.float64), head, control)
        model.generate(input_ids, **GREEDY)
    if not head_sizes:
        limit = float(raised.value.args[0].split("below ")[1].rstrip("."))
        states = torch.randn(50, 16, dtype=torch.float64)
        control = ControlConfig(step_size=0.98 * limit, num_steps=500, target=[1.0, 1.0])
        edited = Controller(head).edit(states, control, control.step_size)
        assert ((head(edited) - 1).norm(dim=-1) <= (head(states) - 1).norm(dim=-1)).all()
        with pytest.raises(FloatingPointError, match="too large"):
            Controller(head).edit(states, control, 1.1 * limit)


def test_what_each_prompt_has_for_itself_is_refused_where_batches_are_no_order_of_prompts(input_ids):
    model, _ = two_headed()
    tokenizer = tiny_tokenizer()
    rollouts = generate_rollouts(model, tokenizer, ["w5", "w6 w7"], max_new_tokens=3)
    for setting in (lambda: model.set_value_heads({"other": (1.0, 0.0)}), lambda: setattr(model, "control", BY_ROW)):
        setting()
        with pytest.raises(ValueError, match="one value for all"):
            generate_rollouts(model, tokenizer, ["w5", "w6 w7"], control=model.control)
        with pytest.raises(ValueError, match="one value for all"):
            kl_divergence(model, rollouts)
        assert generate_rollouts(model, tokenizer, ["w5", "w6 w7"], max_new_tokens=3) == rollouts
        model.set_value_heads({"default": 1.0})
    with pytest.raises(ValueError, match="no value head"):
        generate_rollouts(model.unload(), tokenizer, ["w5"], control=ControlConfig())


def test_a_call_that_cannot_begin_leaves_no_settings_behind(input_ids, monkeypatch):
    model, _ = two_headed()
    expected = model.generate(input_ids, **GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(model._recontrol.settings.controller, "refresh", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(input_ids, control=ControlConfig(step_size=0.01), value_heads={"other": 1.0}, **GREEDY)
    assert torch.equal(model.generate(input_ids, **GREEDY), expected)
    assert not torch.equal(model(input_ids).logits, make_llama(dtype=torch.float64)(input_ids).logits)


def test_the_order_of_heads_prepares_no_mixture_anew(input_ids):
    model, _ = two_headed()
    first = model.generate(input_ids, value_heads={"default": 0.5, "other": 1.0}, **GREEDY)
    plans = len(model._recontrol.settings.controller._plans)
    assert torch.equal(model.generate(input_ids, value_heads={"other": 1.0, "default": 0.5}, **GREEDY), first)
    assert len(model._recontrol.settings.controller._plans) == plans, "their order does not matter"


def test_the_advantage_prepares_no_gram_matrix(input_ids):
    model, _ = two_headed(method="advantage")
    model.generate(input_ids, **GREEDY)
    assert all(plan.gram is None for _, plan in model._recontrol.settings.controller._plans.values())
