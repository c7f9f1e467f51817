"""A LoRA adapter trained by DPO on scored rollouts, as a rival of a comparison."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from hf_recontrol import ReControlForCausalLM, load_prompts
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.evaluation.likelihoods import likelihoods
from hf_recontrol.evaluation.rivals.kinds import make_rival
from hf_recontrol.evaluation.rivals.rival import Bench
from hf_recontrol.settings import SamplingSettings

from .tiny_models import prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

from hf_recontrol.evaluation.rivals.lora_training import AdapterTrainer  # noqa: E402

PROMPTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13", "w14 w15"]
GREEDY = SamplingSettings(max_new_tokens=6, temperature=0, batch_size=4)
STRONG = {"learning_rate": 0.05, "batch_size": 2}


def mean_token(completion_ids):
    return [sum(ids) / len(ids) for ids in completion_ids]


def bench_of(model, folder, num_samples=3, reward=mean_token, chat=False):
    """A bench with scored rollouts of the model."""
    tokenizer, rollouts = tiny_tokenizer(chat=chat), folder / "rollouts"
    model.generation_config.eos_token_id = 2
    write_rollouts(
        rollouts, model, tokenizer, load_prompts(PROMPTS), max_new_tokens=5, num_samples=num_samples, batch_size=8
    )
    label_rollouts(rollouts, [reward])
    return Bench(model, tokenizer, GREEDY, {reward.__name__: reward}, folder / "made", rollouts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A bench whose adapter is trained, and that adapter's folder."""
    bench = bench_of(tiny_model("llama", torch.float32, tie_word_embeddings=True), tmp_path_factory.mktemp("lora"))
    make_rival("lora_dpo", bench, dict(STRONG)).prepare()
    [folder] = bench.folder.iterdir()
    return bench, folder


def logits_of(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=prompts(), **kwargs).logits


def distance(one, other):
    return (one.double() - other.double()).norm() / other.double().norm()


def test_a_pair_is_the_best_and_the_worst_of_one_prompt_and_reaches_the_trainer_as_it_was_drawn(tmp_path):
    bench = bench_of(tiny_model("llama", torch.float32), tmp_path, num_samples=4, chat=True)
    rows = make_rival("lora_dpo", bench, {}).trainer(tmp_path / "trainer").train_dataset
    of_prompt = {}
    for rollout in load_rollouts(bench.rollouts):
        of_prompt.setdefault(rollout.prompt_number, []).append(rollout)
    assert len(rows) == len(of_prompt) == len(PROMPTS)
    for row, rollouts in zip(rows, of_prompt.values(), strict=True):
        ordered = sorted(rollouts, key=lambda rollout: rollout.reward)
        assert row["prompt_ids"] == ordered[0].prompt_ids
        assert row["prompt_ids"][0] == 3  # the template's `user`
        assert row["chosen_ids"] == ordered[-1].completion_ids
        assert row["rejected_ids"] == ordered[0].completion_ids
    assert bench.tokenizer.pad_token == "<pad>"


def test_ties_make_no_pair_and_pairs_can_be_limited(tmp_path):
    def first_only(prompts, completions):
        return [float(number) if prompt != "w8" else 0.0 for number, prompt in enumerate(prompts)]

    bench = bench_of(tiny_model("llama", torch.float32), tmp_path, reward=first_only)
    assert "w8" not in [best.prompt for best, _ in make_rival("lora_dpo", bench, {}).pairs]
    assert len(make_rival("lora_dpo", bench, {}).pairs) == 3
    assert len(make_rival("lora_dpo", bench, {"max_pairs": 2}).pairs) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "`r` must be"),
        ({"beta": 0}, "`beta` must be above 0"),
        ({"training_arguments": {"nothing": 1}}, "nothing"),
        ({"training_arguments": {"output_dir": "x"}}, "output_dir"),
        ({"adapter": "no/such/folder"}, "holds no adapter"),
    ],
)
def test_what_cannot_work_is_said_before_any_training(trained, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        make_rival("lora_dpo", trained[0], settings)


def test_rollouts_without_pairs_are_refused_with_the_way_out(tmp_path):
    model = tiny_model("llama", torch.float32)
    single = bench_of(model, tmp_path / "single", num_samples=1)
    with pytest.raises(ValueError, match="`num_samples` of at least 2"):
        make_rival("lora_dpo", single, {})
    with pytest.raises(ValueError, match="different reward"):
        make_rival("lora_dpo", bench_of(model, tmp_path / "ties", reward=lambda completions: [1.0] * 12), {})
    with pytest.raises(ValueError, match="name their folder"):
        make_rival("lora_dpo", replace(single, rollouts=None), {})


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("with_head", [False, True])
def test_the_adapter_is_that_of_peft_inside_and_the_base_is_untouched_outside(trained, merge, with_head):
    bench, folder = trained
    model = copy.deepcopy(bench.model)
    expected = logits_of(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())
    plain, state = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    if with_head:
        model = ReControlForCausalLM.from_model(model, tiny_head(model))
    bench = replace(bench, model=model)
    rival = make_rival("lora_dpo", bench, STRONG | {"merge": merge, "adapter": str(folder)})
    rival.prepare()
    with rival.policy(1.0):
        adapted = logits_of(model)
    assert (adapted - plain).abs().max() > 0.05
    torch.testing.assert_close(adapted, expected, atol=1e-4, rtol=1e-4)
    with rival.policy(1e-9):
        torch.testing.assert_close(logits_of(model), plain, atol=1e-5, rtol=1e-5)
    answers = [answer.rollout.completion_ids for answer in rival.answer(load_prompts(PROMPTS), 1.0)]
    assert answers != [rollout.completion_ids for rollout in bench.draw(load_prompts(PROMPTS))]
    if with_head:
        model = model.unload()
    assert torch.equal(logits_of(model), plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert dict(model.named_modules()) == modules and not hasattr(model, "peft_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_its_kl_is_that_of_an_independent_peft_model(trained):
    bench, folder = trained
    rival = make_rival("lora_dpo", bench, dict(STRONG))
    rival.prepare()
    rollouts = [answer.rollout for answer in rival.answer(load_prompts(PROMPTS), 1.0)]
    other = peft.PeftModel.from_pretrained(copy.deepcopy(bench.model), folder).eval()
    for rollout, found in zip(
        rollouts, likelihoods(bench.model, rollouts, lambda: rival.policy(1.0), batch_size=4), strict=True
    ):
        ids, start = torch.tensor([rollout.prompt_ids + rollout.completion_ids]), len(rollout.prompt_ids) - 1
        with torch.no_grad():
            own = other(input_ids=ids).logits[0, start:-1].log_softmax(-1)
            base = bench.model(input_ids=ids).logits[0, start:-1].log_softmax(-1)
        assert found.kl == pytest.approx(float((own.exp() * (own - base)).sum()), rel=1e-3, abs=1e-5)


def test_training_prefers_the_chosen_responses_and_is_measured(trained):
    bench, folder = trained
    rival = make_rival("lora_dpo", bench, dict(STRONG))
    rival.prepare()
    margins = []
    for best, worst in rival.pairs:
        high, low = likelihoods(bench.model, [best, worst], lambda: rival.policy(1.0))
        margins.append(high.log_ratio - low.log_ratio)
    assert sum(margins) > 0
    about = json.loads((folder / "training.json").read_text())
    assert about["pairs"] == len(rival.pairs) and about["steps"] == 2
    assert about["seconds"] > 0 and about["peak_memory_bytes"] > 1 << 20


def test_a_trained_adapter_is_kept(trained, monkeypatch):
    bench, folder = trained
    monkeypatch.setattr(AdapterTrainer, "train", lambda *args, **kwargs: 1 / 0)
    # What is left of a run that was killed after the adapter had its name.
    leftover = folder.with_name(f".{folder.name}") / "checkpoints" / "checkpoint-1"
    leftover.mkdir(parents=True)
    make_rival("lora_dpo", bench, STRONG | {"merge": True}).prepare()
    assert list(bench.folder.iterdir()) == [folder]
    with pytest.raises(ZeroDivisionError):
        make_rival("lora_dpo", bench, STRONG | {"beta": 0.2}).prepare()


def test_an_adapter_of_another_model_is_refused(trained):
    bench, folder = trained
    other = replace(bench, model=tiny_model("llama", torch.float32, num_hidden_layers=2))
    with pytest.raises(ValueError, match="another model"):
        make_rival("lora_dpo", other, {"adapter": str(folder)}).prepare()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "changes lm_head, whose weight is also that of",
        ),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "more than a sum of weights"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "set `merge: false`"),
    ],
)
def test_what_merging_would_change_is_refused(lora, message, trained, tmp_path):
    bench = trained[0]
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **lora)
    peft.get_peft_model(copy.deepcopy(bench.model), adapter).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=message):
        make_rival("lora_dpo", bench, {"adapter": str(tmp_path)}).prepare()
    make_rival("lora_dpo", bench, {"adapter": str(tmp_path), "merge": False}).prepare()


@pytest.mark.parametrize(
    ("family", "dtype", "error"),
    [("gpt2", torch.float32, 1e-5), ("gemma2", torch.float64, 1e-6), ("llama", torch.bfloat16, None)],
)
def test_merged_equals_beside_the_weights_at_any_strength(family, dtype, error, trained, tmp_path):
    model = tiny_model(family, dtype)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5
    )
    torch.manual_seed(0)
    peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    plain, found = logits_of(model), {}
    for merge in (True, False):
        settings = {"adapter": str(tmp_path / "adapter"), "merge": merge}
        rival = make_rival("lora_dpo", replace(trained[0], model=model), settings)
        rival.prepare()
        for strength in (0.1, 1.0):
            with rival.policy(strength):
                found[merge, strength] = logits_of(model)
        assert torch.equal(logits_of(model), plain)
    # In bfloat16 they differ as that dtype's rounding of the base alone does.
    error = error or 4 * distance(plain, logits_of(copy.deepcopy(model).double()))
    for strength in (0.1, 1.0):
        assert distance(found[True, strength], found[False, strength]) < error
    small, large = ((found[False, strength] - plain).norm() for strength in (0.1, 1.0))
    assert 0 < small < large
