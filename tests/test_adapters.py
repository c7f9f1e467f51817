"""A head names its base by a name alone, so a base with an adapter is merged first, or refused by name."""

import json

import pytest
import torch

from hf_recontrol import ControlConfig, LoadingSettings, ReControlForCausalLM, ValueHead, fit, generate_rollouts
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.states import collect_states, write_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.heads.base_model import load_base_model
from hf_recontrol.pipelines.loading import load_base

from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

peft = pytest.importorskip("peft")
PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]
LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SAMPLING = {"max_new_tokens": 4, "num_samples": 2}


def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


@pytest.fixture
def base(tmp_path):
    model = tiny_model("llama", torch.float32)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return load_base_model(tmp_path / "base")


def adapted(base):
    torch.manual_seed(0)
    return peft.get_peft_model(base, peft.LoraConfig(**LORA)).eval()


def uses(model, folder):
    """Everything that goes on to a head that names its base."""
    tokenizer = tiny_tokenizer()
    rollouts = generate_rollouts(tiny_model("llama", torch.float32), tokenizer, PROMPTS[:2], **SAMPLING)
    for number, rollout in enumerate(rollouts):
        rollout.reward = [float(number)]
    scored = folder / "scored"
    plain = tiny_model("llama", torch.float32)
    write_rollouts(scored, plain, tokenizer, load_prompts(PROMPTS[:2]), **SAMPLING)
    return {
        "fit": lambda: fit(model, PROMPTS, variety, folder / "run", tokenizer=tokenizer, quiet=True),
        "rollouts": lambda: write_rollouts(folder / "new", model, tokenizer, load_prompts(PROMPTS), **SAMPLING),
        "in memory": lambda: collect_states(model, rollouts),
        "states": lambda: write_states(folder / "states", model, labelled(scored)),
    }


def labelled(folder):
    from hf_recontrol.collection.scoring.labels import label_rollouts

    label_rollouts(folder, {"variety": variety}, again=True)
    return folder


def test_a_peft_model_is_refused_by_everything_that_makes_a_head(base, tmp_path):
    model = adapted(base)
    for name, use in uses(model, tmp_path).items():
        with pytest.raises(TypeError, match=r"PeftModelForCausalLM cannot be the base .*merge_and_unload"):
            use()
        assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists(), name
    # Its rollouts would not follow the seed.
    with pytest.raises(TypeError, match="merge_and_unload"):
        generate_rollouts(model, tiny_tokenizer(), PROMPTS)


@pytest.mark.parametrize("form", ["peft's base", "added", "merged in place"])
def test_a_model_in_which_an_adapter_acts_is_refused_by_everything_that_makes_a_head(form, base, tmp_path):
    if form == "added":
        base.add_adapter(peft.LoraConfig(**LORA))
    else:
        model = adapted(base)
        if form == "merged in place":
            model.merge_adapter()
        base = model.get_base_model()
    for name, use in uses(base, tmp_path).items():
        with pytest.raises(ValueError, match="a head would name its base without it"):
            use()
        assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists(), name


def test_an_adapter_that_is_off_is_the_base(base, tmp_path):
    plain = tiny_model("llama", torch.float32)
    plain.generation_config.eos_token_id = 2
    base.add_adapter(peft.LoraConfig(**LORA))
    acting = generate_rollouts(base, tiny_tokenizer(), PROMPTS[:4], **SAMPLING)
    base.disable_adapters()
    assert write_rollouts(tmp_path / "r", base, tiny_tokenizer(), load_prompts(PROMPTS[:4]), **SAMPLING)
    off = generate_rollouts(base, tiny_tokenizer(), PROMPTS[:4], **SAMPLING)
    expected = generate_rollouts(plain, tiny_tokenizer(), PROMPTS[:4], **SAMPLING)
    assert [r.completion_ids for r in off] == [r.completion_ids for r in expected]
    assert [r.completion_ids for r in off] != [r.completion_ids for r in acting]


def test_a_folder_with_an_adapter_is_no_base_for_any_loader(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapted(base).save_pretrained(adapter)
    tiny_tokenizer().save_pretrained(adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    head = tiny_head(tiny_model("llama", torch.float32), "lm_head", control=ControlConfig(step_size=0.1))
    head.save_pretrained(tmp_path / "head")
    loaders = [
        lambda: load_base_model(adapter),
        lambda: load_base(adapter, LoadingSettings()),
        lambda: ReControlForCausalLM.from_pretrained(adapter, value_head=head),
        lambda: fit(str(adapter), PROMPTS, variety, tmp_path / "run", quiet=True),
    ]
    try:
        from hf_recontrol.integrations.lm_eval import ReControlLM
    except ImportError:
        pass
    else:
        loaders.append(lambda: ReControlLM(str(adapter), value_head=str(tmp_path / "head"), device="cpu"))
    for load in loaders:
        with pytest.raises(OSError, match=r"holds an adapter for .*base: merge it first, and name the folder"):
            load()
    # Beside a whole model too: there peft would act, and without peft the model alone.
    tiny_model("llama", torch.float32).save_pretrained(adapter)
    with pytest.raises(OSError, match="merge it first"):
        load_base_model(adapter)


def test_what_the_message_says_makes_a_base_whose_head_finds_it_again(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "adapter")
    merged = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    model, _ = load_base(str(tmp_path / "merged"), LoadingSettings())
    controlled = ReControlForCausalLM.from_model(model, tiny_head(tiny_model("llama", torch.float32)))
    controlled.save_pretrained(tmp_path / "head")
    again = ReControlForCausalLM.from_pretrained(tmp_path / "head")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(ids).logits, controlled(ids).logits)
    with again.disable_control():
        assert not torch.allclose(again(ids).logits, load_base_model(tmp_path / "base")(ids).logits)


def test_a_head_saved_where_an_adapter_acts_names_no_base(base, tmp_path, recontrol_warnings):
    controlled = ReControlForCausalLM.from_model(
        adapted(base).get_base_model(), tiny_head(tiny_model("llama", torch.float32))
    )
    controlled.save_pretrained(tmp_path / "head")
    assert ValueHead.from_pretrained(tmp_path / "head").config.base_model_name_or_path is None
    assert "names no base" in recontrol_warnings[0]
    # A head that was trained on a base keeps its name.
    controlled.value_head.config.base_model_name_or_path = "org/base"
    controlled.save_pretrained(tmp_path / "named")
    assert ValueHead.from_pretrained(tmp_path / "named").config.base_model_name_or_path == "org/base"
