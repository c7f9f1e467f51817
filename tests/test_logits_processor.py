"""Control as a logits processor: the tokens of the controlled model, from a base whose class does not change."""

import gc
import threading

import pytest
import torch
from transformers import GenerationConfig

from hf_recontrol import ControlConfig, ReControlForCausalLM, ReControlLogitsProcessor

from .tiny_models import FAMILIES, left_pad, lm_head_of, prompts, tiny_head, tiny_model

CONTROLS = {
    "ascent": ControlConfig(step_size=0.7, num_steps=8),
    "advantage": ControlConfig("advantage", 1.5),
    "static": ControlConfig("static", 1.5),
    "plausibility": ControlConfig("advantage", 4.0, plausibility=0.3),
    "max_kl": ControlConfig("advantage", 4.0, max_kl=0.3),
    "both guards": ControlConfig("advantage", 4.0, plausibility=0.3, max_kl=0.3),
    "per row": ControlConfig("advantage", (0.0, 1.0, 2.0)),
}
SOFT_CAPPED = {"gemma2", "xlstm"}


def padded():
    ids, mask = left_pad([prompts(1, 7)[0], prompts(1, 3, seed=2)[0], prompts(1, 5, seed=3)[0]])
    return {"input_ids": ids, "attention_mask": mask}


def both(model, head, control, inputs, **options):
    """The tokens of the controlled model, then those of the base with the processor."""
    controlled = ReControlForCausalLM.from_model(model, head, control)
    torch.manual_seed(0)
    expected = controlled.generate(**inputs, max_new_tokens=8, **options)
    base = controlled.unload()
    processor = ReControlLogitsProcessor(base, head, control)
    torch.manual_seed(0)
    return expected, base.generate(**inputs, max_new_tokens=8, logits_processor=[processor], **options)


def test_a_model_that_comes_under_control_later_is_not_controlled_twice():
    model = tiny_model("llama")
    head = tiny_head(model, "lm_head")
    processor = ReControlLogitsProcessor(model, head, CONTROLS["advantage"])
    expected = model.generate(prompts(), max_new_tokens=4, logits_processor=[processor])
    controlled = ReControlForCausalLM.from_model(model, head, CONTROLS["advantage"])
    with pytest.raises(ValueError, match="would be controlled twice"):
        controlled.generate(prompts(), max_new_tokens=4, logits_processor=[processor])
    # Under no control of its own it is the processor's alone.
    found = controlled.generate(prompts(), max_new_tokens=4, logits_processor=[processor], control=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - SOFT_CAPPED))
def test_tokens_are_those_of_the_controlled_model_in_every_family(family):
    model = tiny_model(family)
    head = tiny_head(model, "lm_head")
    inputs = {"input_ids": prompts(2, 6)}
    plain = model.generate(**inputs, max_new_tokens=8)
    expected, found = both(model, head, CONTROLS["advantage"], inputs)
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, {"num_beams": 3}],
    ids=["greedy", "sampling", "beams"],
)
def test_tokens_are_those_of_the_controlled_model_in_every_mode(name, options):
    if name == "per row" and "num_beams" in options:
        pytest.skip("refused, see below")
    model = tiny_model("llama")
    expected, found = both(model, tiny_head(model, "lm_head"), CONTROLS[name], padded(), **options)
    assert torch.equal(found, expected)


def test_a_chunked_prefill_and_several_calls_with_one_processor():
    model = tiny_model("llama")
    head, control = tiny_head(model, "lm_head"), CONTROLS["advantage"]
    expected, found = both(model, head, control, padded(), prefill_chunk_size=2)
    assert torch.equal(found, expected)
    processor = ReControlLogitsProcessor(model, head, control)
    for length in (4, 12, 5):
        expected, _ = both(tiny_model("llama"), head, control, {"input_ids": prompts(2, length)})
        assert torch.equal(
            model.generate(prompts(2, length), max_new_tokens=8, logits_processor=[processor]), expected
        )


def test_the_hook_goes_with_the_processor():
    model = tiny_model("llama")
    hooks = lm_head_of(model)._forward_pre_hooks
    kind = type(model)
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"))
    assert len(hooks) == 1 and type(model) is kind
    del processor
    gc.collect()
    assert not hooks
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"))
    processor.remove()
    assert not hooks
    with pytest.raises(ValueError, match="a removed hook"):
        model.generate(prompts(), max_new_tokens=2, logits_processor=[processor])


def test_no_control_leaves_the_scores_alone():
    model = tiny_model("llama")
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"), ControlConfig(step_size=0.0))
    options = {"max_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(prompts(), **options).scores
    for one, two in zip(plain, model.generate(prompts(), logits_processor=[processor], **options).scores, strict=True):
        assert torch.equal(one, two)


def test_threads_do_not_see_each_other_s_states():
    model = tiny_model("llama")
    head, control = tiny_head(model, "lm_head"), CONTROLS["ascent"]
    inputs = [prompts(2, 6, seed=seed) for seed in range(4)]
    alone = [
        model.generate(ids, max_new_tokens=8, logits_processor=[ReControlLogitsProcessor(model, head, control)])
        for ids in inputs
    ]
    shared, found = ReControlLogitsProcessor(model, head, control), {}

    def work(i):
        found[i] = model.generate(inputs[i], max_new_tokens=8, logits_processor=[shared])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], alone[i]) for i in range(4))


@pytest.mark.parametrize("family", sorted(SOFT_CAPPED))
def test_logits_that_are_capped_are_refused(family):
    model = tiny_model(family, dtype=torch.float32)
    with pytest.raises(ValueError, match="not a linear map of the state"):
        ReControlLogitsProcessor(model, tiny_head(model, "lm_head"))
    assert not lm_head_of(model)._forward_pre_hooks


def test_heads_elsewhere_and_controlled_models_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="this one reads 'decoder_layer'"):
        ReControlLogitsProcessor(model, tiny_head(model))
    head = tiny_head(model, "lm_head")
    with pytest.raises(ValueError, match="controlled already"):
        ReControlLogitsProcessor(ReControlForCausalLM.from_model(model, head), head)


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 2.0}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda options: next(iter(options)),
)
def test_modes_with_other_forwards_raise_instead_of_drawing_from_the_wrong_state(options):
    model = tiny_model("llama")
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"))
    ids = prompts(1, 3).repeat(1, 4)
    with pytest.raises(ValueError, match="one forward of the model for each token"):
        model.generate(ids, max_new_tokens=8, logits_processor=[processor], **options)


def test_step_sizes_per_row_need_a_row_each():
    model = tiny_model("llama")
    processor = ReControlLogitsProcessor(model, tiny_head(model, "lm_head"), CONTROLS["per row"])
    config = GenerationConfig(num_beams=3, max_new_tokens=4, pad_token_id=0)
    with pytest.raises(ValueError, match="3 values for 9 rows"):
        model.generate(prompts(3), generation_config=config, logits_processor=[processor])


def test_bfloat16_and_a_head_with_a_bias():
    for family in ("llama", "phi"):
        model = tiny_model(family, dtype=torch.bfloat16)
        expected, found = both(model, tiny_head(model, "lm_head"), CONTROLS["advantage"], {"input_ids": prompts(2, 6)})
        assert (found == expected).float().mean() > 0.9, "all but near ties"
