"""Chat models of transformers on this machine as judges."""

import json
import re
import sys

import pyarrow.parquet as parquet
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_recontrol import compare
from hf_recontrol.evaluation.judges.kinds import judge_of
from hf_recontrol.evaluation.judges.scoring import JudgeScoring

from .compared import make_inputs, settings
from .test_judges import PAIRS, judged, rollout
from .tiny_models import tiny_model
from .tiny_tokenizer import byte_tokenizer, chatml_tokenizer, tiny_tokenizer

SAYS = {"pair": '{"verdict":"A"}', "score": '{"score":7}', "nothing": "w", "declines": "sorry"}


def parrot(folder, what):
    """A chat model that says one word for ever."""
    tokenizer = tiny_tokenizer(chat=True, more_words=tuple(SAYS.values()))
    sizes = {"vocab_size": len(tokenizer), "n_positions": 512, "n_embd": 8, "n_layer": 1, "n_head": 2}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(SAYS[what])] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"kind": "local", "model": str(folder), "max_tokens": 3, "max_retries": 1}


def test_it_is_asked_in_both_orders(tmp_path):
    found, counts = judged(judge_of(parrot(tmp_path / "m", "pair")), tmp_path / "v", PAIRS)
    assert found["win_rate"] == [0.5] * 4
    assert (counts["orders_disagree"], counts["identical"], counts["calls"]) == (3, 1, 6)
    assert counts["output_tokens"] == 6 * 3
    assert counts["input_tokens"] > 6 * 30
    _, counts = judged(judge_of(parrot(tmp_path / "m", "pair")), tmp_path / "v", PAIRS)
    assert counts["new_calls"] == 6  # other weights: its layer is random
    _, counts = judged(
        judge_of({"kind": "local", "model": str(tmp_path / "m"), "max_tokens": 3}), tmp_path / "v", PAIRS
    )
    assert counts["new_calls"] == 0


def test_it_scores(tmp_path):
    judge = judge_of(parrot(tmp_path / "m", "score") | {"mode": "score"})
    assert JudgeScoring(judge, tmp_path / "v").scorer().score([rollout("a"), rollout("b")], []) == {"judge": [7, 7]}


def test_what_a_model_draws_with_by_its_own_default_does_not_count(tmp_path):
    given = parrot(tmp_path / "m", "score") | {"mode": "score"}
    own = {"repetition_penalty": 100.0, "no_repeat_ngram_size": 1, "suppress_tokens": [5], "do_sample": True}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": 9}))
    judge = judge_of(given)
    [reply] = judge.replies([[{"role": "user", "content": f"w5 {SAYS['score']}"}]])
    assert reply.text.replace(" ", "") == SAYS["score"] * 3
    assert judge.loaded[0].generation_config.eos_token_id == 9


def test_marks_of_a_turn_in_an_answer_are_text(tmp_path, monkeypatch):
    given = parrot(tmp_path / "m", "pair")
    tokenizer = chatml_tokenizer()
    tokenizer.padding_side = "left"
    judge = judge_of(given)
    model, _ = judge.loaded
    judge.__dict__["loaded"] = (model, tokenizer)
    asked = []
    monkeypatch.setattr(
        model, "generate", lambda **rows: asked.append(rows["input_ids"]) or rows["input_ids"][:, :1].repeat(1, 600)
    )
    judge.replies([[{"role": "user", "content": "Bad.<|im_end|>Good."}]])
    # The turn of the system and that of the question.
    assert asked[0][0].tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert "Bad.<|im_end|>Good." in tokenizer.decode(asked[0][0])


def test_verdicts_depend_on_the_chat_template(tmp_path):
    given = parrot(tmp_path / "m", "pair")
    judged(judge_of(given), tmp_path / "v", PAIRS)
    assert judged(judge_of(given), tmp_path / "v", PAIRS)[1]["new_calls"] == 0
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert judged(judge_of(given), tmp_path / "v", PAIRS)[1]["new_calls"] > 0


@pytest.mark.parametrize(("what", "why"), [("nothing", "unparsable"), ("declines", "refused")])
def test_it_may_fail_to_judge(tmp_path, what, why):
    found, counts = judged(judge_of(parrot(tmp_path / "m", what)), tmp_path / "v", PAIRS[:1])
    assert found["win_rate"] == [None]
    assert (counts[why], counts["calls"]) == (1, 4)


def test_what_is_too_long_for_it_has_no_verdict(tmp_path):
    given = parrot(tmp_path / "m", "pair")
    found, counts = judged(judge_of(given), tmp_path / "v", [("w5 " * 600, "w6"), ("w5", "w6")])
    assert (found["win_rate"], counts["unparsable"]) == ([None, 0.5], 1)


def test_what_does_not_fit_costs_the_others_no_padding(tmp_path, monkeypatch):
    judge = judge_of(parrot(tmp_path / "m", "pair"))
    model, widths = judge.loaded[0], []
    drawn = model.generate
    monkeypatch.setattr(model, "generate", lambda **rows: widths.append(rows["input_ids"].shape) or drawn(**rows))
    talks = [[{"role": "user", "content": "w5 " * count}] for count in (5000, 3, 9)]
    replies = judge.replies(talks)
    assert [reply.text is None for reply in replies] == [True, False, False]
    assert replies[1:] == judge.replies(talks[1:])
    assert widths == [(2, replies[2].input_tokens)] * 2


def test_thoughts_that_the_chat_template_begins_are_no_verdict(tmp_path):
    given = parrot(tmp_path / "m", "pair")
    template = tmp_path / "m" / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}<think>{% endif %}")
    found, counts = judged(judge_of(given), tmp_path / "v", PAIRS[:1])
    assert (found["win_rate"], counts["unparsable"]) == ([None], 1)


def test_a_batch_says_what_each_would_alone(tmp_path):
    model = tiny_model("llama", dtype=torch.float32)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "m")
    talks = [[{"role": "user", "content": " ".join(f"w{i}" for i in range(5, 5 + n))}] for n in (1, 30, 9)]
    judge = judge_of({"kind": "local", "model": str(tmp_path / "m"), "max_tokens": 12})
    together = judge.replies(talks)
    assert together == [judge.replies([talk])[0] for talk in talks]
    assert len({reply.text for reply in together}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "int3"}, "`judge.dtype` must be one of"),
        ({"batch_size": 0}, "`judge.batch_size`"),
        ({"device": 3}, "`judge.device`"),
        ({"device": "cuda:99"}, "`judge.device` must be one that torch has here, got 'cuda:99'"),
        ({"device": "toaster"}, "`judge.device` must be one that torch has here, got 'toaster'"),
        ({"trust_remote_code": "yes"}, "`judge.trust_remote_code`"),
        ({"base_url": "http://x"}, "no setting base_url"),
    ],
)
def test_wrong_settings_are_named(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        judge_of({"kind": "local", "model": "m"} | changes)


def test_what_cannot_chat_is_refused_before_any_work(tmp_path, monkeypatch):
    make_inputs(tmp_path, count=6)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_model("llama").save_pretrained("mute")
    byte_tokenizer().save_pretrained("mute")
    with pytest.raises(ValueError, match="mute has no chat template"):
        compare(**settings(judge={"kind": "local", "model": "mute"}), quiet=True)
    with pytest.raises(OSError, match="absent"):
        compare(**settings(judge={"kind": "local", "model": "./absent"}), quiet=True)
    assert not (tmp_path / "out").exists()
    compare(**settings(judge=parrot(tmp_path / "judge", "score") | {"mode": "score"}), quiet=True)
    assert {line["judge"] for line in parquet.read_table("out/answers.parquet").to_pylist()} == {7}
    sys.modules.pop("mine", None)
