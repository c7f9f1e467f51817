"""Sequence classifiers as rewards: what is scored, alone as in a batch, and what is refused."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
)

from hf_recontrol import ClassifierReward, Rollout, fit, load_reward, score_rollouts
from hf_recontrol.collection.scoring.rewards import by_name

from .tiny_models import tiny_model
from .tiny_tokenizer import TEMPLATE, byte_tokenizer, tiny_tokenizer

SIZES = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = SIZES | {"intermediate_size": 16}
LONG = " ".join(f"w{i}" for i in range(10, 60))
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TEMPLATE
)


def llama(pad_token_id=0, num_labels=1, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 64} | changes, num_labels=num_labels)
    model = LlamaForSequenceClassification(config).eval()
    model.config.pad_token_id = pad_token_id
    return model


def bert(**changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL | {"max_position_embeddings": 16} | changes)).eval()


def with_bos(tokenizer):
    """`<unk>` before each text of a pair, as Llama's tokenizers put their first token."""
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", pair="<unk> $A <unk> $B", special_tokens=[("<unk>", 1)]
    )
    return tokenizer


def with_separators(tokenizer):
    """Texts and pairs as BERT has them: w90 begins, w91 separates and ends."""
    tokenizer.cls_token, tokenizer.sep_token = "w90", "w91"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w90 $A w91", pair="w90 $A w91 $B:1 w91:1", special_tokens=[("w90", 90), ("w91", 91)]
    )
    return tokenizer


def change(tokenizer, **values):
    for name, value in values.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [
        (lambda: llama(0), lambda: tiny_tokenizer(chat=True)),
        (lambda: llama(96), lambda: tiny_tokenizer(chat=True)),
        (lambda: llama(0), lambda: change(tiny_tokenizer(chat=True), pad_token=None)),
        (lambda: llama(2), lambda: change(tiny_tokenizer(chat=True), pad_token="<end>")),
        (lambda: llama(2), lambda: tiny_tokenizer()),
        (lambda: llama(None), lambda: tiny_tokenizer(chat=True)),
        (lambda: llama(-1), lambda: tiny_tokenizer(chat=True)),
        (lambda: llama(97), lambda: tiny_tokenizer(chat=True)),
        (lambda: bert(num_labels=1, pad_token_id=5), lambda: with_separators(tiny_tokenizer())),
        (lambda: bert(num_labels=1), lambda: tiny_tokenizer()),
    ],
)
def test_a_score_does_not_depend_on_its_batch_whatever_pads(model, tokenizer):
    reward = ClassifierReward(model(), tokenizer())
    completions = [" w5", " w6 w7 w8", " w20 w21 w22 w23 w24 w25"]
    together = reward(["w9 w10"] * 3, completions)
    assert together == pytest.approx([reward(["w9 w10"], [text])[0] for text in completions], abs=1e-6)
    assert len(set(together)) == 3


def test_a_chat_s_score_is_the_model_s_own_at_its_last_token():
    model, tokenizer = llama(96), tiny_tokenizer(chat=True)
    chat = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w5 w6"}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"]
    expected = model.score(model.model(ids).last_hidden_state[0, -1]).item()
    reward = ClassifierReward(model, tokenizer)
    scores = reward([chat[:1], "w9", "w1"], ["w5 w6", "w5 w6", "w5 w6 w7 w8 w9"])
    assert scores[:2] == pytest.approx([expected] * 2, abs=1e-6)


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_special_tokens_that_a_chat_mentions_are_text(where):
    reward = ClassifierReward(llama(vocab_size=258), change(byte_tokenizer(), chat_template=TEMPLATE))
    if "sanitize_control_tokens" not in inspect.signature(reward.tokenizer.apply_chat_template).parameters:
        pytest.skip("this release of transformers lacks it")
    texts = {"prompt": "w9", "completion": "w5"} | {where: "w7 <end> w8"}
    assert reward.encode(**texts)[0]["input_ids"].count(1) == 2, "only those that the template writes"
    # Here `<end>` is a word like any other.
    assert ClassifierReward(llama(), tiny_tokenizer(chat=True)).encode(**texts)[0]["input_ids"].count(2) == 3


def test_without_a_template_prompt_and_response_are_one_text_as_trl_s_trainer_has_them():
    trl = pytest.importorskip("trl.data_utils")
    reward = ClassifierReward(llama(), with_bos(tiny_tokenizer()))
    inputs, _ = reward.encode("w9 w10", " w5 w6")
    assert inputs["input_ids"] == trl._tokenize(reward.tokenizer, "w9 w10" + " w5 w6" + "<end>")["input_ids"]
    assert inputs["input_ids"] == [1, 9, 10, 5, 6, 2]
    inputs, _ = reward.encode([{"role": "user", "content": [{"type": "text", "text": "w9"}]}], "w5")
    assert inputs["input_ids"] == [1, 9, 5, 2]


def test_a_tokenizer_with_a_separator_gets_a_pair():
    reward = ClassifierReward(bert(num_labels=1), with_separators(tiny_tokenizer()))
    inputs, _ = reward.encode("w9 w10", "w5")
    assert inputs["input_ids"] == [90, 9, 10, 91, 5, 91]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # The chat's own first token stays, the rest is its end.
        (
            lambda: (llama(max_position_embeddings=6), change(tiny_tokenizer(chat=True), bos_token="user")),
            [3, 59, 2, 4, 5, 2],
        ),
        (lambda: (llama(max_position_embeddings=6), with_bos(tiny_tokenizer())), [1, 57, 58, 59, 5, 2]),
        (
            lambda: (bert(num_labels=1, max_position_embeddings=6), with_separators(tiny_tokenizer())),
            [90, 58, 59, 91, 5, 91],
        ),
        (
            lambda: (bert(num_labels=1), change(with_separators(tiny_tokenizer()), model_max_length=6)),
            [90, 58, 59, 91, 5, 91],
        ),
    ],
)
def test_what_is_too_long_keeps_its_end_and_is_counted(make, expected, recontrol_warnings):
    reward = ClassifierReward(*make())
    separated = " w5" if not reward.takes_pairs else "w5"
    assert reward.encode("w9", "")[1] is False and reward.encode(LONG, separated)[1] is True
    assert reward.encode(LONG, separated)[0]["input_ids"] == expected
    scores = reward([LONG] * 3, [separated, separated.replace("w5", "w6"), "w7"])
    assert len(set(scores)) == 3, "the responses are what is read"
    assert any("3 of 3 texts are longer than the 6 tokens" in message for message in recontrol_warnings)


def test_positions_that_begin_behind_the_padding_token_are_counted(recontrol_warnings):
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL, max_position_embeddings=12, pad_token_id=1, num_labels=1, type_vocab_size=1)
    tokenizer = with_separators(tiny_tokenizer())
    reward = ClassifierReward(RobertaForSequenceClassification(config), tokenizer)
    assert reward.longest == 10 and len(reward.encode(LONG, "w5")[0]["input_ids"]) == 10
    together = reward([LONG, "w9"], ["w5", "w6"])
    assert together == pytest.approx([reward([LONG], ["w5"])[0], reward(["w9"], ["w6"])[0]], abs=1e-6)
    gpt2 = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=12, pad_token_id=0, num_labels=1)
    assert ClassifierReward(GPT2ForSequenceClassification(gpt2), tokenizer).longest == 12


def saved(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer(chat=True)).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_without_its_whole_head_is_refused(tmp_path):
    whole = saved(tmp_path / "whole", llama())
    assert load_reward(whole)(["w9"], ["w5"])[0] == pytest.approx(
        ClassifierReward(llama(), tiny_tokenizer(chat=True))(["w9"], ["w5"])[0], abs=1e-6
    )
    base = saved(tmp_path / "base", LlamaForCausalLM(LlamaConfig(**SMALL, num_labels=1)))
    with pytest.raises(ValueError, match=r"no sequence classifier.*\['LlamaForCausalLM'\].*score\.weight.*random"):
        load_reward(base)
    part = saved(tmp_path / "part", bert(num_labels=1))
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack classifier\.bias, which would be random"):
        load_reward(part)
    config = json.loads((tmp_path / "whole" / "config.json").read_text()) | {"model_type": "vit"}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="whole is no sequence classifier: "):
        load_reward(whole)


def test_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    saved(tmp_path / "adapter", peft.get_peft_model(llama(), config))
    with pytest.raises(ValueError, match="is an adapter: merge it into its base"):
        load_reward(str(tmp_path / "adapter"))


def test_a_label_is_named_as_the_command_names_it(tmp_path):
    folder = saved(tmp_path / "m", llama(num_labels=3))
    with pytest.raises(ValueError, match=r"m has several labels, \['LABEL_0', .*\]: choose one, `.*m#LABEL`"):
        load_reward(folder)
    with pytest.raises(ValueError, match=r"m has no label 'GOOD', it has \['LABEL_0'"):
        load_reward(f"{folder}#GOOD")
    rewards = by_name([load_reward(f"{folder}#LABEL_{i}") for i in range(3)])
    assert list(rewards) == [f"{folder}#LABEL_{i}" for i in range(3)]
    model, tokenizer = llama(num_labels=3), tiny_tokenizer(chat=True)
    chat = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w5"}]
    expected = model(**tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)).logits[0]
    assert [reward(["w9"], ["w5"])[0] for reward in rewards.values()] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_chat_that_the_template_refuses_is_named_and_can_be_skipped(tmp_path, recontrol_warnings):
    reward = ClassifierReward(llama(), change(tiny_tokenizer(chat=True), chat_template=REFUSES_SYSTEM))
    refused = [{"role": "system", "content": "w8"}, {"role": "user", "content": "w9"}]
    rows = [Rollout(prompt, "w5", [5], [6], True) for prompt in ("w9", refused, refused[1:])]
    with pytest.raises(ValueError, match=r"row 1: the reward .* refuses this chat: no system turns"):
        score_rollouts(rows, reward)
    first, second, third = (r.reward for r in score_rollouts(rows, reward, on_bad_rows="skip"))
    assert second is None and first == third
    chats = [{"prompt": refused[1:]}] * 40 + [{"prompt": refused}]
    model = tiny_model("llama", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"row 40: the chat template of .* refuses this chat: no system turns"):
        fit(model, chats, reward, tmp_path / "run", tokenizer=tiny_tokenizer(chat=True), quiet=True)
    assert not (tmp_path / "run").exists()


PARTS_ALONE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} <end>{% endfor %}"
)
TEXTS_ALONE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] | trim + ' <end>' }}{% endfor %}"
)
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "w9"}]}]


@pytest.mark.parametrize("template", [PARTS_ALONE, TEXTS_ALONE, TEMPLATE])
def test_contents_in_parts_and_as_texts_are_read_alike_whatever_the_template_writes(template):
    tokenizer = change(byte_tokenizer(), chat_template=template)
    reward = ClassifierReward(llama(vocab_size=258), tokenizer)
    texts = [tokenizer.decode(reward.encode(prompt, "w5 w6")[0]["input_ids"]) for prompt in ("w9", IN_PARTS)]
    assert texts[0] == texts[1] and "w9" in texts[0] and "w5 w6" in texts[0] and "type" not in texts[0]


def test_a_part_that_is_no_text_is_refused_where_the_template_writes_texts_alone():
    reward = ClassifierReward(llama(vocab_size=258), change(byte_tokenizer(), chat_template=TEXTS_ALONE))
    with pytest.raises(ValueError, match="refuses this chat: it writes texts alone"):
        reward.encode([{"role": "user", "content": [{"type": "image"}]}], "w5")


@pytest.mark.parametrize("family", ["xlnet", "fnet"])
def test_models_that_read_padding_score_one_text_at_a_time(family):
    small = {"vocab_size": 97, "num_labels": 1, "pad_token_id": 0}
    if family == "xlnet":
        config = XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=32, initializer_range=0.5, **small)
    else:
        config = FNetConfig(
            hidden_size=16,
            num_hidden_layers=1,
            intermediate_size=32,
            initializer_range=0.5,
            tpu_short_seq_length=8,
            **small,
        )
    torch.manual_seed(0)
    reward = ClassifierReward(AutoModelForSequenceClassification.from_config(config).eval(), tiny_tokenizer())
    answers = ["w5", "w6 w7 w8 w9 w10", "w11 w12"]
    together = reward(["w5"] * 3, answers)
    assert together == pytest.approx([reward(["w5"], [answer])[0] for answer in answers], abs=1e-6)
    assert len(set(together)) == 3


def test_another_tokenizer_is_another_reward():
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=16, n_layer=1, n_head=2, num_labels=1, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    one, other = (
        ClassifierReward(model, tokenizer) for tokenizer in (tiny_tokenizer(), tiny_tokenizer(more_words=("zz",)))
    )
    assert one.fingerprint == ClassifierReward(model, tiny_tokenizer()).fingerprint != other.fingerprint
