"""Devices that a CPU can only simulate: one without float64, and one process with several GPUs."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_recontrol import ControlConfig, ReControlForCausalLM, ReControlLogitsProcessor
from hf_recontrol.collection.rollouts import generate_rollouts
from hf_recontrol.collection.states import collect_states
from hf_recontrol.data.processes import Processes, float64_device
from hf_recontrol.data.states import StateStore
from hf_recontrol.evaluation.metrics import kl_divergence
from hf_recontrol.training import trainer
from hf_recontrol.training.advantage import AdvantageModel, AdvantageTargets, AdvantageTrainer, _fit_constant
from hf_recontrol.training.held_out import split_by_prompt
from hf_recontrol.training.targets import Episodes
from hf_recontrol.training.value import measure_value_head, train_value_head

from .away import device_without_float64
from .conftest import STRONG, make_head, make_llama
from .test_training import CONFIG, FAST, episodes
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

ASCENT = ControlConfig(step_size=0.5, num_steps=5)
PROMPTS = ["w5 w6 w7", "w8", "w9 w10"]


def test_the_simulated_device_has_no_float64():
    with device_without_float64() as away:
        moved = torch.ones(2, 3).to(away)
        assert moved.device == (moved @ moved.T).device == away and float(moved.sum()) == 6
        with pytest.raises(TypeError, match="no float64"):
            moved.double()
        assert float64_device(away) == torch.device("cpu") and moved.cpu().double().sum() == 6
    assert float64_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    "control",
    [
        ASCENT,
        ControlConfig(step_size=0.01, num_steps=5, target=1.0),
        ControlConfig("advantage", 0.5),
        ControlConfig("advantage", (0.5, 0.0, 1.0), plausibility=0.1),
    ],
)
def test_control_on_a_device_without_float64_gives_the_same_logits(control):
    model, ids = tiny_model("llama", torch.float32), torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    head = tiny_head(model, "lm_head", head_sizes=() if control.method == "ascent" else (24,))

    @torch.no_grad()
    def everything(model, ids):
        model = ReControlForCausalLM.from_model(model, head, control)
        logits, values = model(ids).logits, model.values(ids)
        base = model.unload()
        processor = ReControlLogitsProcessor(base, head, control)
        scores = processor(ids, base(ids, logits_to_keep=1).logits[:, -1])
        return logits.cpu(), values.cpu(), scores.cpu()

    expected = everything(model, ids)
    assert not torch.allclose(expected[0], tiny_model("llama", torch.float32)(ids).logits)
    head = copy.deepcopy(head)  # without what the first model prepared
    with device_without_float64() as away:
        head.to(away)
        found = everything(tiny_model("llama", torch.float32).to(away), ids.to(away))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rollouts_states_and_kl_on_a_device_without_float64():
    model = tiny_model("llama", torch.float32)
    head = tiny_head(model, "lm_head")
    rollouts = generate_rollouts(model, tiny_tokenizer(), PROMPTS, num_samples=2, max_new_tokens=5, temperature=1.0)
    for number, rollout in enumerate(rollouts):
        rollout.reward = [float(number)]
    states = collect_states(model, rollouts)
    controlled = ReControlForCausalLM.from_model(model, head, ASCENT)
    kl = kl_divergence(controlled, rollouts)
    plain = tiny_model("llama", torch.float32)
    with device_without_float64() as away:
        plain.to(away)
        found = collect_states(plain, rollouts)
        torch.testing.assert_close(found.hidden, states.hidden)
        torch.testing.assert_close(found.directions, states.directions)
        model = ReControlForCausalLM.from_model(plain, head, ASCENT)
        assert kl_divergence(model, rollouts) == pytest.approx(kl, rel=1e-4)


@pytest.mark.usefixtures("recontrol_warnings")
def test_the_closed_form_and_all_figures_on_a_device_without_float64():
    states = episodes(60)
    states.tokens = torch.randint(7, (len(states.hidden),), generator=torch.Generator().manual_seed(0))
    head, _ = train_value_head(states, replace(CONFIG, static_vector=True, token_bias_size=7), num_epochs=1)
    store = StateStore.of(states)
    parts = [
        Episodes(store, part, head, ["hidden", "directions", "tokens"], False)
        for part in split_by_prompt(store.prompts, 0.2, 0)
    ]

    def everything():
        fitted = SimpleNamespace(
            accelerator=SimpleNamespace(unwrap_model=lambda model: model),
            model=AdvantageModel(head),
            held_out=parts[1],
            processes=Processes(),
            targets=AdvantageTargets(0.0, 1.0),
        )
        fitted.figures = partial(AdvantageTrainer.figures, fitted)
        figures = _fit_constant(fitted, head, *parts)
        vectors = torch.cat([head.static_vector.cpu(), head.token_bias.cpu()])
        return vectors, figures, measure_value_head(head, states)["value_error"]

    expected = everything()
    with device_without_float64() as away:
        head.to(away)
        assert next(head.parameters()).device == away
        vectors, figures, error = everything()
    assert expected[0].any()
    torch.testing.assert_close(vectors, expected[0], rtol=1e-3, atol=1e-5)
    assert figures == pytest.approx(expected[1], rel=1e-4) and error == pytest.approx(expected[2])


@pytest.mark.parametrize("device", [None, "mps", "xpu"])
def test_without_accelerate_a_process_takes_the_accelerator_that_torch_has(monkeypatch, device):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("hf_recontrol.data.processes.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device and torch.device(device))
    assert Processes().device == torch.device(device or "cpu")


class Several(trainer.TrainingArguments):
    """What a machine with 4 GPUs makes of them."""

    def __post_init__(self):
        super().__post_init__()
        self._n_gpu = 4


@pytest.mark.usefixtures("recontrol_warnings")
def test_one_process_with_several_gpus_trains_on_one_and_takes_the_batches_that_were_asked_for(monkeypatch):
    one, _ = train_value_head(episodes(), CONFIG, **FAST | {"num_epochs": 3})
    monkeypatch.setattr(trainer, "TrainingArguments", Several)
    several, _ = train_value_head(episodes(), CONFIG, **FAST | {"num_epochs": 3})
    for name, tensor in one.state_dict().items():
        assert torch.equal(several.state_dict()[name], tensor), name


@pytest.mark.parametrize("inside", ["a block", "nothing"])
def test_data_parallel_copies_of_a_controlled_model_are_refused(inside):
    """They run in threads of their own, where nothing knows of the caller's `disable_control()`."""
    model = ReControlForCausalLM.from_model(make_llama(), make_head(), STRONG)
    ids = torch.tensor([[1, 5, 9]])
    replica = model._replicate_for_data_parallel()  # what `nn.DataParallel` runs
    with (
        model.disable_control() if inside == "a block" else model.use_control(None),
        pytest.raises(RuntimeError, match="Start one process for each GPU"),
    ):
        replica(ids)
    # Without a second GPU it makes no copies.
    assert torch.equal(nn.DataParallel(model)(ids).logits, model(ids).logits)
    assert model.unload()._replicate_for_data_parallel()(ids).logits.shape == (1, 3, 32)
