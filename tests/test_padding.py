"""A row alone and the same row padded give the same figures in every forward of ours, whatever the family."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_recontrol import ControlConfig, ReControlForCausalLM, ReControlLogitsProcessor
from hf_recontrol.collection.kept_states import KeptStates, kept_settings
from hf_recontrol.collection.rollouts import generate_rollouts, write_rollouts
from hf_recontrol.collection.states import collect_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import Rollout, load_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.evaluation.metrics import kl_divergence
from hf_recontrol.modeling.generation import read_padding
from hf_recontrol.pipelines.fit import fit

from . import tiny_models
from .conftest import make_head
from .tiny_models import FAMILIES, VOCAB, left_pad, prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_DECODER = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_XGLM = {"num_layers": 3, "attention_heads": 4, "ffn_dim": 24}
# Further families with learned positions, with positions of an offset of their own, and those that read padding.
MORE = {
    "gpt_bigcode": tiny_models.FAMILIES["gpt2"][1],
    "xglm": {key: _DECODER[key] for key in ("vocab_size", "d_model", "max_position_embeddings", "pad_token_id")}
    | _XGLM,
    "biogpt": _SIZES,
    "stablelm": _SIZES | {"num_key_value_heads": 2},
    "roberta": _SIZES | {"is_decoder": True, "type_vocab_size": 1},
    "bart": _DECODER,
    "rwkv": _SIZES,
    "recurrent_gemma": _SIZES | {"num_key_value_heads": 1, "block_types": ["recurrent", "attention"]},
    "cpmant": _SIZES | {"dim_ff": 24, "dim_head": 4},
}
BERT = _SIZES | {"type_vocab_size": 1}
# What the bases themselves do: their own generation is not what their forward says.
NOT_FORWARDS = {
    "cpmant": "a prompt is read in both directions",
    "recurrent_gemma": "a prompt of one token is read behind the state of the call before",
}
READS = {"xlstm": {"left"}, "bart": {"left"}, "rwkv": {"left"}, "recurrent_gemma": {"left"}, "cpmant": {"right"}}
every_family = pytest.mark.parametrize("family", [*FAMILIES, *MORE])

CONTROL = ControlConfig(step_size=0.5, num_steps=3)
ROLLOUT = Rollout("w5 w6", "w7", [5, 6], [7], True, reward=[1.0])
PROMPTS = ["w5 w6 w7 w8 w9 w10 w11", "w8", "w9 w10 w3", "w4 w5"]
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


def make(family):
    if family in FAMILIES:
        return tiny_model(family, torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **MORE.get(family, BERT)), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "time" not in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def controlled(family, **options):
    base = make(family)
    head = tiny_head(base, "lm_head", **options)
    return ReControlForCausalLM.from_model(base, head, CONTROL)


def scored(rollouts):
    return [dataclasses.replace(rollout, reward=[float(i)]) for i, rollout in enumerate(rollouts)]


@every_family
def test_it_is_known_on_which_sides_a_model_reads_padding(family):
    assert read_padding(make(family)) == READS.get(family, set())


@pytest.mark.parametrize("family", ["bert", "cpmant"])
def test_a_model_that_sees_later_tokens_is_refused(family, tmp_path, monkeypatch):
    """A BERT that nobody told that it is a decoder; a model whose prompt is read in both directions."""
    model = make(family)
    if family == "bert":
        model = ReControlForCausalLM.from_model(model, make_head(hook_point="lm_head"), CONTROL)
        with pytest.raises(ValueError, match=r"BertLMHeadModel lets a position see the tokens behind it.*is_decoder"):
            kl_divergence(model, [ROLLOUT])
        model.unload()
    with pytest.raises(ValueError, match="lets a position see the tokens behind it"):
        collect_states(model, [ROLLOUT])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lets a position see the tokens behind it"):
        fit(
            model,
            [f"w{i}" for i in range(3, 43)],
            lambda prompts, completions, **columns: [float(len(text)) for text in completions],
            "unused",
            tokenizer=tiny_tokenizer(),
        )


def test_masked_rows_that_give_nan_are_not_padded_either():
    """In float64 eager attention makes NaN of rows that are masked whole."""
    assert read_padding(tiny_model("gemma2", torch.float64)) == {"left", "right"}


def test_looking_for_it_leaves_a_model_in_training_as_it_was():
    model = tiny_model("gpt2", torch.float32, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert read_padding(model) == set()
    assert [module.training for module in model.modules()] == before


@every_family
@torch.no_grad()
def test_values(family):
    model = controlled(family)
    rows = [prompts(1, length, seed=length)[0] for length in (9, 4, 6)]
    ids, mask = left_pad(rows)
    alone = [model.values(row[None])[0] for row in rows]
    assert (alone[0][3] - alone[0][-1]).abs() > 1e-2, "V tells states apart"
    for side in ("left", "right"):
        if side == "right":
            shifts = (mask == 0).sum(1).tolist()
            ids, mask = (torch.stack([x.roll(-n) for x, n in zip(y, shifts, strict=True)]) for y in (ids, mask))
        if side in READS.get(family, ()):
            with pytest.raises(ValueError, match=f"Row 1 is padded on the {side}, and .* reads padding there"):
                model.values(ids, mask)
            continue
        for row, expected, row_mask in zip(model.values(ids, mask), alone, mask, strict=True):
            torch.testing.assert_close(row[row_mask.bool()], expected, **TOLERANCE)


@torch.no_grad()
def test_values_behind_a_cache_and_of_embeddings_are_at_their_positions():
    model = controlled("gpt2")
    rows = [prompts(1, length, seed=length)[0] for length in (9, 5)]
    ids, mask = left_pad(rows)
    expected = model.values(ids, mask)
    torch.testing.assert_close(
        model.values(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask), expected, **TOLERANCE
    )
    with model.disable_control():
        cache = model(
            ids[:, :6], attention_mask=mask[:, :6], position_ids=(mask[:, :6].cumsum(-1) - 1).clamp(min=0)
        ).past_key_values
    torch.testing.assert_close(model.values(ids[:, 6:], mask, past_key_values=cache), expected[:, 6:], **TOLERANCE)


@every_family
@torch.no_grad()
def test_rollouts_states_and_kl(family, tmp_path):
    """Sampling pads on the left, teacher forcing on the right: both see what a row alone does."""
    if family in NOT_FORWARDS:
        pytest.skip(NOT_FORWARDS[family])
    model = controlled(family)
    tokenizer, options = tiny_tokenizer(), {"max_new_tokens": 5, "temperature": 0.0}
    alone = [generate_rollouts(model, tokenizer, [prompt], **options)[0] for prompt in PROMPTS]
    write_rollouts(tmp_path, model, tokenizer, load_prompts(PROMPTS), **options, keep_states=True)
    together = load_rollouts(tmp_path)
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]

    rollouts = scored(together)
    by_one = collect_states(model, rollouts, batch_size=1)
    batch = collect_states(model, rollouts, batch_size=4)
    torch.testing.assert_close(batch.hidden, by_one.hidden, **TOLERANCE)
    torch.testing.assert_close(batch.directions, by_one.directions, **TOLERANCE)

    settings = kept_settings(model.hook_point, read_manifest(tmp_path, "rollouts", "")["settings"])
    kept = KeptStates(tmp_path, 0, settings, ["hidden", "directions"], model.hook_point.width)
    found = [kept.find(rollout) for rollout in together]
    for name in ("hidden", "directions"):
        torch.testing.assert_close(torch.cat([each[name] for each in found]), getattr(by_one, name), **TOLERANCE)

    kl = kl_divergence(model, rollouts, batch_size=4)
    assert kl > 1e-4
    assert kl == pytest.approx(kl_divergence(model, rollouts, batch_size=1), rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "opt", "bloom", "stablelm"])
def test_the_logits_processor(family):
    model = make(family)
    head = tiny_head(model, "lm_head")
    processor = ReControlLogitsProcessor(model, copy.deepcopy(head), CONTROL)
    ids, mask = left_pad([prompts(1, length, seed=length)[0] for length in (9, 4, 6)])

    def generate(ids, mask, processors):
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, logits_processor=processors
        )
        return output[:, ids.shape[1] :].tolist()

    together = generate(ids, mask, [processor])
    assert together != generate(ids, mask, [])
    for row, row_mask, tokens in zip(ids, mask, together, strict=True):
        row = row[row_mask.bool()][None]
        assert generate(row, torch.ones_like(row), [processor]) == [tokens]
