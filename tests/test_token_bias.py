"""The token bias: what is fitted, where it is kept, and what control with it does and refuses."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from hf_recontrol import (
    ControlConfig,
    ReControlForCausalLM,
    States,
    StateStore,
    ValueHead,
    ValueHeadConfig,
    collect_states,
    fit_advantage,
    generate_rollouts,
    load_prompts,
    load_rollouts,
    measure_value_head,
    score_rollouts,
    train_head,
    train_value_head,
    write_rollouts,
    write_states,
)
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.control.controller import Controller
from hf_recontrol.training.token_bias import TokenSums, token_means

from .conftest import make_head
from .reference import reference_logits
from .tiny_models import VOCAB, prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("recontrol_warnings")

TOKENIZER = tiny_tokenizer()
WIDTH, TOKENS = 4, 12
CONFIG = ValueHeadConfig(WIDTH, head_sizes=[8], hook_point="lm_head", static_vector=True, token_bias_size=TOKENS)
STATIC, ADVANTAGE = ControlConfig("static", 0.7), ControlConfig("advantage", 0.7)


def sums(count, left):
    return TokenSums(torch.tensor(count, dtype=torch.float64), torch.tensor(left, dtype=torch.float64))


def test_means_by_hand():
    # Three states of token 0 with 2 left, one of token 1 with -6, in each fold; token 2 is never drawn.
    means = token_means([sums([3, 1, 0], [6, -6, 0])] * 2)
    # The smallest penalty is best, less what is left on average.
    first, second = 12 / 6.3, -12 / 2.3
    middle = (6 * first + 2 * second) / 8
    torch.testing.assert_close(means, torch.tensor([first - middle, second - middle, -middle]))
    # Noise, which is other noise in each fold, is not kept.
    assert not token_means([sums([3, 1, 0], [6, -6, 0]), sums([3, 1, 0], [-6, 6, 0])]).any()
    assert not token_means([sums([0, 0], [0, 0])] * 5).any()


def planted(count: int = 2000, seed: int = 0, noise: float = 0.3) -> tuple[States, torch.Tensor, torch.Tensor]:
    """Episodes whose reward is what their tokens are worth: by a vector, and by a number each that no vector gives."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(TOKENS, WIDTH, generator=generator)
    slope, worth = torch.randn(WIDTH, generator=generator), torch.randn(TOKENS, generator=generator)
    # Nothing of it is linear in the rows, nor the same for all tokens.
    inputs = torch.cat([rows, torch.ones(TOKENS, 1)], 1)
    worth = worth - inputs @ torch.linalg.lstsq(inputs, worth[:, None]).solution[:, 0]
    lengths = torch.randint(2, 6, (count,), generator=generator)
    total = int(lengths.sum())
    tokens = torch.randint(TOKENS, (total,), generator=generator)
    directions = rows[tokens] - rows.mean(0)
    gains = directions @ slope + worth[tokens]
    rewards = torch.stack([part.sum() for part in gains.split(lengths.tolist())])
    states = States(
        hidden=torch.randn(total, WIDTH, generator=generator),
        lengths=lengths,
        rewards=(rewards + noise * torch.randn(count, generator=generator))[:, None],
        prompts=torch.arange(count) // 2,
        directions=directions,
        tokens=tokens,
        vocabulary_size=TOKENS,
    )
    return states, slope, worth


def fitted(states: States, config: ValueHeadConfig, **changes) -> tuple[ValueHead, dict]:
    torch.manual_seed(0)
    head = ValueHead(config)
    with torch.no_grad():
        for parameter in head.value_mlp.parameters():
            parameter.zero_()
    return head, fit_advantage(head, states, gae_lambda=1.0, **changes)


@pytest.mark.parametrize("sizes", [None, [16]])
def test_it_is_what_the_static_vector_leaves(sizes):
    states, slope, worth = planted()
    head, figures = fitted(states, replace(CONFIG, advantage_sizes=sizes), advantage_num_epochs=1)
    torch.testing.assert_close(head.static_vector, slope, rtol=0.2, atol=0.2)
    assert torch.corrcoef(torch.stack([head.token_bias, worth]))[0, 1] > 0.97
    plain, without = fitted(
        states, replace(CONFIG, token_bias_size=None, advantage_sizes=sizes), advantage_num_epochs=1
    )
    torch.testing.assert_close(head.static_vector, plain.static_vector)
    assert figures["constant_correlation"] > without["constant_correlation"] + 0.01
    assert figures["constant_error"] < without["constant_error"]
    if sizes is not None:
        assert figures["advantage_error"] <= figures["constant_error"] + 1e-6


@pytest.mark.parametrize("constant", [0.0, 3.0, 1234.567])
def test_states_that_are_all_the_same_explain_nothing(constant):
    states, slope, _ = planted(400)
    same = replace(states, hidden=torch.full_like(states.hidden, constant))
    head, _ = train_value_head(same, CONFIG, num_epochs=1, scaling="none")
    figures = fit_advantage(head, same, gae_lambda=1.0)
    assert torch.cosine_similarity(head.static_vector, slope, dim=0) > 0.95
    assert figures["constant_error"] < 0.8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_no_finite_number_is_refused(bad):
    states, _, _ = planted(60)
    states.rewards[3] = bad
    with pytest.raises(ValueError, match="rewards or values hold NaN"):
        fit_advantage(ValueHead(CONFIG), states)


def test_g_is_trained_on_what_the_token_bias_leaves():
    # g sees the token's row alone, and could learn nothing of what the bias holds: with it, its error is smaller.
    states, _, _ = planted()
    _, figures = fitted(states, replace(CONFIG, advantage_sizes=[16]), advantage_num_epochs=3)
    _, without = fitted(states, replace(CONFIG, token_bias_size=None, advantage_sizes=[16]), advantage_num_epochs=3)
    assert figures["advantage_error"] < without["advantage_error"] - 0.01


def test_states_without_the_tokens_or_of_another_vocabulary_are_refused():
    states, _, _ = planted(60)
    for changes in ({"tokens": None}, {"vocabulary_size": None}, {"vocabulary_size": TOKENS + 1}):
        with pytest.raises(ValueError, match="token bias"):
            fit_advantage(ValueHead(CONFIG), replace(states, **changes))
    for tokens in (states.tokens - 1, states.tokens + 1):
        with pytest.raises(ValueError, match="`tokens` must be ids from 0 to 11"):
            fit_advantage(ValueHead(CONFIG), replace(states, tokens=tokens))
    # V needs none.
    head, _ = train_value_head(replace(states, tokens=None), CONFIG, num_epochs=1)
    assert measure_value_head(head, replace(states, tokens=None))["held_out_episodes"] > 0


def test_a_bias_that_held_out_prompts_speak_against_is_all_zeros(monkeypatch):
    states, _, worth = planted()
    for sign, kept in ((1, True), (-1, False)):
        monkeypatch.setattr("hf_recontrol.training.advantage.token_means", lambda folds, sign=sign: sign * worth)
        head, figures = fitted(states, CONFIG)
        assert head.token_bias.any() == kept
        assert figures["constant_correlation"] > 0.2


@pytest.mark.parametrize("every", [1, 3])
def test_states_hold_the_tokens_that_were_drawn_from_them(tmp_path, every):
    model = tiny_model("llama", torch.float32)
    model.generation_config.eos_token_id = 2
    rows = load_prompts([f"w{i} w{i + 1}" for i in range(5, 15)])
    write_rollouts(tmp_path / "rollouts", model, TOKENIZER, rows, max_new_tokens=7, part_size=4, temperature=1.5)
    label_rollouts(tmp_path / "rollouts", [lambda completions, **columns: [float(len(x)) for x in completions]])
    write_states(tmp_path / "states", model, tmp_path / "rollouts", every=every, hook_point="lm_head")
    store, rollouts = StateStore.open(tmp_path / "states"), load_rollouts(tmp_path / "rollouts")
    assert store.has_tokens and store.vocabulary_size == VOCAB
    expected = [[y for k, y in enumerate(r.completion_ids[::-1]) if k % every == 0][::-1] for r in rollouts]
    for chosen in ([3, 0], range(len(rollouts))):
        found = store.gather("tokens", torch.tensor(list(chosen)))
        assert found.tolist() == [y for i in chosen for y in expected[i]]
    if every == 1:
        memory = collect_states(model, rollouts, hook_point="lm_head")
        assert memory.vocabulary_size == VOCAB
        assert torch.equal(memory.tokens, store.gather("tokens", torch.arange(len(store))))
        directions = model.lm_head.weight[memory.tokens] - memory.directions
        logits = memory.hidden @ model.lm_head.weight.T
        torch.testing.assert_close(directions, torch.softmax(logits / 1.5, -1) @ model.lm_head.weight)
    else:
        assert collect_states(model, rollouts, hook_point="decoder_layer").vocabulary_size is None


@pytest.fixture
def scored(tmp_path):
    """(a tiny model, a folder of states) of rollouts whose reward is what their tokens are worth."""
    model = tiny_model("llama", torch.float32)
    rows = load_prompts([f"w{i % 40} w{i}" for i in range(80)])
    write_rollouts(tmp_path / "rollouts", model, TOKENIZER, rows, max_new_tokens=6, num_samples=2)
    worth = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)).tolist()
    label_rollouts(
        tmp_path / "rollouts",
        [lambda completion_ids, **columns: [sum(worth[y] for y in ids) for ids in completion_ids]],
    )
    write_states(tmp_path / "states", model, tmp_path / "rollouts", hook_point="lm_head")
    return model, tmp_path / "states"


FAST = {"head_sizes": (8,), "num_epochs": 1, "advantage_sizes": None}


def test_training_in_a_folder_keeps_it_with_the_head(scored, tmp_path):
    model, states = scored
    train_head(tmp_path / "head", states, **FAST)
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.token_bias_size == VOCAB and head.token_bias.any()
    assert f"{VOCAB} tokens" in (tmp_path / "head" / "README.md").read_text(encoding="utf-8")
    ReControlForCausalLM.from_model(model, head, ControlConfig("static"))


def test_a_folder_without_the_tokens_is_refused(scored, tmp_path, monkeypatch):
    _, states = scored
    monkeypatch.setattr(StateStore, "has_tokens", False)
    with pytest.raises(ValueError, match="--no-token-bias"):
        train_head(tmp_path / "head", states, **FAST)
    train_head(tmp_path / "head", states, **FAST, token_bias=False)


@pytest.mark.parametrize("why", ["it is not asked for", "it does not help"])
def test_training_in_a_folder_leaves_it_out(scored, tmp_path, monkeypatch, why):
    model, states = scored
    if why == "it does not help":
        monkeypatch.setattr("hf_recontrol.training.advantage.token_means", lambda folds: torch.zeros(VOCAB))
    train_head(tmp_path / "head", states, **FAST, token_bias=why == "it does not help")
    head = ValueHead.from_pretrained(tmp_path / "head")
    assert head.config.token_bias_size is None and not hasattr(head, "token_bias")
    assert head.config.training.figures and head.seen_prompts is not None
    ReControlForCausalLM.from_model(model, head, ControlConfig("static"))


def test_a_head_without_any_is_a_head_as_before(tmp_path):
    head = make_head(hook_point="lm_head", static_vector=True)
    head.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["token_bias_size"] is None
    assert not hasattr(ValueHead.from_pretrained(tmp_path), "token_bias")


def test_it_alone_is_enough_to_act():
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head")
    with torch.no_grad():
        head.static_vector.zero_()
        head.advantage_mlp.layers[-1].weight.zero_()
        head.advantage_mlp.layers[-1].bias.zero_()
    ids = prompts()
    base = model(ids).logits
    for control in (STATIC, ADVANTAGE):
        controlled = ReControlForCausalLM.from_model(copy.deepcopy(model), head, control)
        torch.testing.assert_close(controlled(ids).logits, base + 0.7 * head.token_bias)
    with torch.no_grad():
        head.token_bias.zero_()
    with pytest.raises(ValueError, match="would do nothing"):
        ReControlForCausalLM.from_model(copy.deepcopy(model), head, STATIC)


class Module(torch.nn.Module):
    """No [`ValueHead`], with a static vector and what is called a token bias."""

    def __init__(self, model, size, **tensors):
        super().__init__()
        width = model.config.hidden_size
        self.config = ValueHeadConfig(width, hook_point="lm_head", static_vector=True, token_bias_size=size)
        for name, tensor in ({"static_vector": torch.ones(width).double()} | tensors).items():
            self.register_buffer(name, tensor)


def test_of_any_module_the_configuration_says_whether_there_is_one():
    model, ids, bias = tiny_model("llama"), prompts(), torch.randn(VOCAB, dtype=torch.float64)

    def logits(*args, **tensors):
        head = Module(model, *args, **tensors)
        return ReControlForCausalLM.from_model(copy.deepcopy(model), head, STATIC)(ids).logits

    torch.testing.assert_close(logits(VOCAB, token_bias=bias), logits(None) + 0.7 * bias)
    torch.testing.assert_close(logits(None, token_bias=bias), logits(None))
    with pytest.raises(TypeError, match="token_bias"):
        logits(VOCAB)
    for odd in (bias[:5], bias[:, None], bias[0]):
        with pytest.raises(ValueError, match="`token_bias` of Module has the shape"):
            logits(VOCAB, token_bias=odd)


def test_a_head_without_it_is_the_same_head_otherwise():
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model, "lm_head")
    plain = head.without_token_bias()
    assert not hasattr(plain, "token_bias") and plain.state_mean.dtype == head.state_mean.dtype
    logits = [ReControlForCausalLM.from_model(copy.deepcopy(model), x, ADVANTAGE)(ids).logits for x in (head, plain)]
    torch.testing.assert_close(logits[0], logits[1] + 0.7 * head.token_bias)
    with torch.no_grad():
        plain.static_vector.zero_()
    assert head.static_vector.any()


def test_heads_with_and_without_one_mix():
    model = tiny_model("llama")
    one, plain = tiny_head(model, "lm_head"), tiny_head(model, "lm_head", seed=3).without_token_bias()
    controlled = ReControlForCausalLM.from_model(copy.deepcopy(model), plain, STATIC)
    controlled.add_value_head("with", one)
    ids = prompts()
    for rows in (2.0, (0.5, -1.0)):
        weights = torch.tensor(rows, dtype=torch.float64)
        columns = weights[:, None, None] if weights.ndim else weights
        with controlled.use_control(STATIC, {"default": 1.0, "with": rows}):
            found = controlled(ids).logits
        edit = 0.7 * (plain.static_vector + columns * one.static_vector)
        expected = model(ids).logits + edit @ model.lm_head.weight.T + 0.7 * columns * one.token_bias
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["static", "advantage"])
def test_the_kl_guard_holds_of_both_together(method):
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model, "lm_head")
    base = model(ids).logits.log_softmax(-1)
    for limit in (0.02, 1e30):
        control = ControlConfig(method, 5.0, max_kl=limit)
        controlled = ReControlForCausalLM.from_model(copy.deepcopy(model), head, control)
        own = controlled(ids).logits.log_softmax(-1)
        kl = (own.exp() * (own - base)).sum(-1)
        assert kl.max() <= limit * (1 + 1e-6)
        whole = reference_logits(model, head, ids, control=replace(control, max_kl=None)).log_softmax(-1)
        if limit < 1:
            assert kl.min() > 0.9 * limit
            # On the way from the base to the controlled logits, whole.
            shift, full = own - base, whole - base
            shift, full = shift - shift.mean(-1, keepdim=True), full - full.mean(-1, keepdim=True)
            torch.testing.assert_close(torch.cosine_similarity(shift, full, dim=-1), torch.ones(ids.shape).double())
        else:
            torch.testing.assert_close(own, whole)


def test_a_step_too_far_is_told():
    model = tiny_model("llama", torch.float16)
    head = tiny_head(tiny_model("llama", torch.float32), "lm_head")
    with torch.no_grad():
        head.static_vector.zero_()
    controlled = ReControlForCausalLM.from_model(model, head, ControlConfig("static", 1e5))
    with pytest.raises(FloatingPointError, match="token bias"):
        controlled(prompts())


def test_tokens_that_were_added_have_none():
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model, "lm_head")
    model.resize_token_embeddings(VOCAB + 5)
    base = model(ids).logits
    controlled = ReControlForCausalLM.from_model(model, head, STATIC)
    expected = base + 0.7 * head.static_vector @ model.lm_head.weight.T
    expected[..., :VOCAB] += 0.7 * head.token_bias
    torch.testing.assert_close(controlled(ids).logits, expected)


def test_a_smaller_vocabulary_is_refused_wherever_it_is_met():
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head")
    model.resize_token_embeddings(VOCAB - 5)
    with pytest.raises(ValueError, match=rf"{VOCAB} tokens.*{VOCAB - 5}"):
        ReControlForCausalLM.from_model(model, head, STATIC)
    controlled = ReControlForCausalLM.from_model(tiny_model("llama"), head, STATIC)
    controlled.resize_token_embeddings(VOCAB - 5)
    ids = prompts() % (VOCAB - 5)
    with pytest.raises(ValueError, match=rf"{VOCAB} tokens.*{VOCAB - 5}"):
        controlled(ids)
    with controlled.disable_control():
        controlled(ids)


def test_who_reads_the_lm_heads_weight_is_refused():
    model = tiny_model("llama")
    controlled = ReControlForCausalLM.from_model(model, tiny_head(model, "lm_head"), STATIC)
    hidden = torch.randn(1, 2, model.config.hidden_size, dtype=torch.float64)
    with pytest.raises(ValueError, match="token bias"):
        controlled.edit_lm_head_input(hidden)
    with controlled.use_control(ControlConfig("ascent")):
        assert not torch.equal(controlled.edit_lm_head_input(hidden), hidden)


@pytest.mark.parametrize("changes", [{"token_bias_size": 0}, {"token_bias_size": True}, {"token_bias_size": 1.5}])
def test_odd_sizes_are_refused(changes):
    with pytest.raises(ValueError, match="token_bias_size"):
        replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="hook_point='lm_head'"):
        ValueHeadConfig(WIDTH, token_bias_size=5)


def test_scored_rollouts_without_a_token_have_none():
    model = tiny_model("llama", torch.float32)
    rollouts = generate_rollouts(model, TOKENIZER, ["w5 w6", "w7"], max_new_tokens=3)
    empty = replace(rollouts[0], completion_ids=[], completion="")
    scored = score_rollouts([*rollouts, empty], lambda completions, **columns: [float(len(x)) for x in completions])
    states = collect_states(model, scored, hook_point="lm_head")
    assert len(states.tokens) == len(states.hidden) == 6


def test_a_bias_beyond_the_dtype_is_clamped_for_callers_that_ask_for_it():
    head = make_head(hook_point="lm_head", static_vector=True, token_bias_size=4)
    head.token_bias.copy_(torch.tensor([1.0, -1.0, 0.0, 1.0]))
    logits = torch.tensor([[1.0, 2.0, 3.0, -torch.inf, 5.0]] * 2, dtype=torch.float16)
    control, sizes = ControlConfig("static", 1e6), torch.tensor([[1e6], [0.5]])
    with pytest.raises(FloatingPointError, match="token bias"):
        Controller(head).shifted(logits, control, sizes)
    found = Controller(head).shifted(logits, control, sizes, clamp=True)
    # What the base masks stays masked; tokens behind the bias have none; the other row is nobody else's.
    assert found.tolist() == [[65504, -65504, 3, -torch.inf, 5], [1.5, 1.5, 3, -torch.inf, 5]]


@pytest.mark.parametrize("method", ["static", "advantage"])
def test_a_token_bias_that_changed_is_noticed(method):
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model, "lm_head")
    controlled = ReControlForCausalLM.from_model(model, head, ControlConfig(method, 0.7))
    before = controlled(ids).logits
    with torch.no_grad():
        head.token_bias.neg_()
    torch.testing.assert_close(controlled(ids).logits, before + 2 * 0.7 * head.token_bias, rtol=1e-4, atol=1e-4)
