"""
The rows of docs/compatibility.md that are about loading, generating and evaluating, each with the real library around
a tiny random model: under control its tokens are those of a naive reference, and with control off those of the base.
"""

import copy
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
    pipeline,
)

from hf_recontrol import ControlConfig, ReControlForCausalLM

from .reference import reference_control, reference_greedy, reference_logits
from .tiny_models import VOCAB, prompts, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[1]
CONTROL = ControlConfig(step_size=0.5, num_steps=5)
OTHER = ControlConfig(step_size=0.8, num_steps=8)
NEW = 8
HOOK_POINTS = ["decoder_layer", "lm_head"]

every_hook_point = pytest.mark.parametrize("hook_point", HOOK_POINTS)


def generate(model, ids=None, **kwargs):
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(input_ids=prompts() if ids is None else ids, **kwargs).tolist()


def expect(base, head, ids=None, control=CONTROL, **kwargs):
    """Tokens of the base under naive hooks and without, by the base's own generate; they differ in every row."""
    base_tokens = generate(base, ids, **kwargs)
    with reference_control(base, head, control):
        controlled = generate(base, ids, **kwargs)
    assert all(a != b for a, b in zip(base_tokens, controlled, strict=True))
    return controlled, base_tokens


def build(hook_point="decoder_layer", dtype=torch.float64):
    base = tiny_model("llama", dtype=dtype)
    head = tiny_head(base, hook_point)
    model = ReControlForCausalLM.from_model(tiny_model("llama", dtype=dtype), copy.deepcopy(head), CONTROL)
    return model, base, head


def test_every_test_that_the_table_names_exists_and_every_row_names_one():
    text = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        found = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert found, f"no test is named: {row}"
        for file, name in found:
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


# Pipelines


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_pipelines_of_texts_and_chats(kind):
    model, base, head = build()
    tokenizer = tiny_tokenizer(chat=True)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    prompt = "w5 w9 w13" if kind == "text" else [{"role": "user", "content": "w5 w9 w13"}]
    encoded = (
        tokenizer(prompt, return_tensors="pt").input_ids
        if kind == "text"
        else tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).input_ids
    )
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for control in (CONTROL, OTHER, None):
        tokens = reference_greedy(base, head, encoded, control=control, max_new_tokens=NEW)[0, encoded.shape[1] :]
        (answer,) = pipe(prompt, control=control or False, **options)
        assert answer["generated_text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert (
        pipe(prompt, **options) == pipe(prompt, control=CONTROL, **options) != pipe(prompt, control=False, **options)
    )


# Adapters


def lora(seed, model):
    """Sets the active adapter's weights to random ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_A.adapter{seed}" in name or f"lora_B.adapter{seed}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@every_hook_point
def test_several_adapters_and_a_merged_one(hook_point, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=32, target_modules=["q_proj", "lm_head"])
    ids = prompts()

    def adapted(model):
        model = peft.get_peft_model(model, config, adapter_name="adapter1")
        model.add_adapter("adapter2", config)
        lora(1, model)
        lora(2, model)
        return model

    model, base, head = build(hook_point)
    model, expected = adapted(model), []
    for name in ("adapter1", "adapter2"):
        merged = adapted(tiny_model("llama"))
        merged.set_adapter(name)
        merged = merged.merge_and_unload()
        model.set_adapter(name)
        expected.append(reference_greedy(merged, head, ids, control=CONTROL).tolist())
        assert generate(model, ids) == expected[-1] != reference_greedy(merged, head, ids).tolist()
    assert expected[0] != expected[1]
    with model.disable_adapter():
        assert generate(model, ids) == reference_greedy(base, head, ids, control=CONTROL).tolist()
    controlled = model.merge_and_unload()
    assert isinstance(controlled, ReControlForCausalLM)
    assert generate(controlled, ids) == expected[1]
    # A merged model is controlled afterwards as any other.
    again = ReControlForCausalLM.from_model(controlled.unload(), head, CONTROL)
    assert generate(again, ids) == expected[1]


# Quantised linears, other files, other places


def quantised(name):
    if name == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if name == "quanto":
        pytest.importorskip("optimum.quanto")
        return QuantoConfig(weights="int8")
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True) if name == "bitsandbytes8" else BitsAndBytesConfig(load_in_4bit=True)


@pytest.mark.parametrize("name", ["torchao", "quanto", "bitsandbytes8", "bitsandbytes4"])
@pytest.mark.filterwarnings("ignore::FutureWarning:torchao")  # its own use of torch
@pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes")
def test_quantised_linears(name, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "disabled", True)
    size = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    tiny_model("llama", torch.float32, **size).save_pretrained(tmp_path)
    options = {"quantization_config": quantised(name), "device_map": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path, **copy.deepcopy(options))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    linear = base.model.layers[0].mlp.up_proj
    assert type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor
    assert not torch.equal(base(prompts()).logits, plain(prompts()).logits)
    model = ReControlForCausalLM.from_pretrained(tmp_path, value_head=tiny_head(base), control=CONTROL, **options)
    controlled, base_tokens = expect(base, tiny_head(base))
    assert generate(model) == controlled
    assert generate(model, control=False) == base_tokens
    base = ReControlForCausalLM.from_model(model.unload(), tiny_head(base, "lm_head"), CONTROL).unload()
    controlled, _ = expect(base, tiny_head(base, "lm_head"))
    assert generate(ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head"), CONTROL)) == controlled


def write_gguf(model, path):
    """A GGUF file of a tiny Llama in float32, as llama.cpp's converter writes it."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp keeps the two halves of each rotary pair side by side.
            heads = tensor.shape[0] // config.head_dim
            tensor = tensor.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@every_hook_point
def test_a_base_from_a_gguf_file(hook_point, tmp_path):
    pytest.importorskip("gguf")
    base = tiny_model("llama", torch.float32)
    head = tiny_head(base, hook_point)
    write_gguf(base, tmp_path / "tiny.gguf")
    model = ReControlForCausalLM.from_pretrained(
        tmp_path, value_head=head, control=CONTROL, gguf_file="tiny.gguf", dtype=torch.float32
    )
    torch.testing.assert_close(model.lm_head.weight, base.lm_head.weight)
    model.generation_config = base.generation_config
    controlled, base_tokens = expect(base, head)
    assert generate(model) == controlled
    assert generate(model, control=False) == base_tokens


@every_hook_point
@pytest.mark.parametrize("where", ["disk", "cpu", "attached_first"])
def test_offloaded_weights(hook_point, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = tiny_model("llama", torch.float32)
    head = tiny_head(base, hook_point)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    if where == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
        model = ReControlForCausalLM.from_pretrained(
            tmp_path / "base",
            value_head=head,
            control=CONTROL,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        if where == "attached_first":
            model = ReControlForCausalLM.from_model(model, head, CONTROL)
        # Every weight waits in CPU memory and is on the executing device while its module runs.
        model = accelerate.cpu_offload(model, execution_device="cpu")
        if where == "cpu":
            model = ReControlForCausalLM.from_model(model, head, CONTROL)
    assert model.lm_head.weight.device.type == model.model.layers[-1].mlp.up_proj.weight.device.type == "meta"
    controlled, base_tokens = expect(base, head)
    assert generate(model) == controlled
    assert generate(model, control=False) == base_tokens
    torch.testing.assert_close(model.values(prompts()), ReControlForCausalLM.from_model(base, head).values(prompts()))


def test_a_base_in_shards(tmp_path):
    base = tiny_model("llama", torch.float32)
    head = tiny_head(base)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    head.config.base_model_name_or_path = str(tmp_path / "base")
    head.config.control = CONTROL
    head.save_pretrained(tmp_path / "head")
    model = ReControlForCausalLM.from_pretrained(tmp_path / "head")
    assert generate(model) == expect(base, head)[0]
    # A Trainer's checkpoint of a large model: the base in shards, the head inside.
    checkpoint = tmp_path / "run" / "base"
    model.save_pretrained(checkpoint, state_dict=model.state_dict(), max_shard_size="8KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    again = ReControlForCausalLM.from_pretrained(checkpoint, value_head=checkpoint / "value_head")
    assert generate(again) == generate(model)


# Programs


@every_hook_point
@pytest.mark.parametrize("control", [CONTROL, replace(CONTROL, plausibility=0.3), ControlConfig("advantage", 0.5)])
def test_an_exported_program_is_controlled(hook_point, control):
    if control.method == "advantage" and hook_point != "lm_head":
        pytest.skip("an advantage head is at the LM head")
    model, base, head = build(hook_point)
    model.control = control
    model.config.use_cache = False
    ids = prompts()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    program = torch.export.export(model, (), inputs)
    expected = reference_logits(base, head, ids, control=control)
    other = prompts(seed=7)
    torch.testing.assert_close(program.module()(**inputs).logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        program.module()(**(inputs | {"input_ids": other})).logits,
        reference_logits(base, head, other, control=control),
        rtol=1e-9,
        atol=1e-9,
    )
    with model.disable_control():
        program = torch.export.export(model, (), inputs)
    torch.testing.assert_close(program.module()(**inputs).logits, base(**inputs).logits)


def test_a_strict_export_says_what_to_do():
    model, _, _ = build()
    model.config.use_cache = False
    with pytest.raises(Exception, match="strict=False"):
        torch.export.export(model, (), {"input_ids": prompts()}, strict=True)


def test_datasets_map_and_its_cache(tmp_path):
    """The fingerprint of a function that uses the model holds the head and the settings."""
    datasets = pytest.importorskip("datasets")
    model, base, head = build()
    rows = [{"ids": row.tolist()} for row in prompts(4)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")

    def mapped(num_proc=None, **kwargs):
        def answer(batch):
            return {"answer": generate(model, torch.tensor(batch["ids"]), **kwargs)}

        stored = datasets.load_from_disk(tmp_path / "rows")
        return stored.map(answer, batched=True, batch_size=2, num_proc=num_proc)["answer"][:]

    expected = {
        control: reference_greedy(base, head, prompts(4), control=control).tolist()
        for control in (CONTROL, OTHER, None)
    }
    assert mapped() == expected[CONTROL]
    assert mapped(control=False) == expected[None]
    model.control = OTHER
    assert mapped() == expected[OTHER]
    assert mapped(num_proc=2, control=False) == expected[None]
    # The settings of a thread are in no fingerprint, so there nothing is taken from the cache.
    with model.disable_control():
        assert mapped() == expected[None]


def test_a_copy_inside_a_block_that_changes_the_settings_is_refused():
    model, _, _ = build()
    with model.disable_control():
        with pytest.raises(RuntimeError, match="disable_control"):
            copy.deepcopy(model)
        generate(model)
    copy.deepcopy(model)


# Models that also see images


def see(kind):
    """A tiny model that takes images, and its inputs: an image and some words."""
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    generator = torch.Generator().manual_seed(4)
    if kind == "llava":
        image = torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64)
        ids = torch.cat([torch.full((1, 4), 96), prompts(1, 5)], dim=1)
        return tiny_model("llava"), {"input_ids": ids, "pixel_values": image}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1]}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"embed_dim": 8, "hidden_size": 16, "mlp_ratio": 2}
    config = AutoConfig.for_model(
        "qwen2_vl",
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=96,
        video_token_id=95,
        vision_start_token_id=94,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.get_input_embeddings().weight.normal_(0, 1)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.generation_config.bos_token_id = None
    # An image of 4 x 4 patches, merged by 2 x 2 to 4 tokens.
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=generator, dtype=torch.float64)
    ids = torch.cat([torch.tensor([[94, 96, 96, 96, 96, 93]]), prompts(1, 5)], dim=1)
    return model, {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 96).long(),
    }


@every_hook_point
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_text_from_images(hook_point, kind, tmp_path):
    base, inputs = see(kind)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    head = tiny_head(base, hook_point)
    options = {"max_new_tokens": NEW, "do_sample": False}
    base_tokens = base.generate(**inputs, **options).tolist()
    without_image = generate(base, inputs["input_ids"].where(inputs["input_ids"] != 96, 5))
    with reference_control(base, head, CONTROL):
        controlled = base.generate(**inputs, **options, use_cache=False).tolist()
    assert controlled != base_tokens != without_image
    base.save_pretrained(tmp_path / "base")
    model = ReControlForCausalLM.from_pretrained(
        tmp_path / "base", value_head=head, control=CONTROL, dtype=torch.float64
    )
    assert type(model).__name__ == type(base).__name__
    assert model.generate(**inputs, **options).tolist() == controlled
    assert model.generate(**inputs, **options, control=False).tolist() == base_tokens
