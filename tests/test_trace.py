"""A trace says what generation did: its numbers are those that the package gives elsewhere, and its page is inert."""

import copy
import json
import logging
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_recontrol import (
    ControlConfig,
    ReControlForCausalLM,
    TokenChance,
    Trace,
    TracedResponse,
    TracedToken,
    TrainingRecord,
    generate_rollouts,
    trace,
    write_trace,
)
from hf_recontrol.cli import app
from hf_recontrol.collection.sampling import RowSampler, response_seed
from hf_recontrol.evaluation.likelihoods import likelihoods_in_force
from hf_recontrol.evaluation.pages.document import HIGH, OPACITY
from hf_recontrol.evaluation.trace import page as pages
from hf_recontrol.evaluation.trace.texts import TokenTexts
from hf_recontrol.modeling.hooks import read_edits

from .fresh import RECONTROL, run_fresh
from .reference import full_inputs, reference_edit, reference_logits
from .tiny_models import left_pad, tiny_head, tiny_model
from .tiny_tokenizer import byte_tokenizer, chatml_tokenizer, tiny_tokenizer

ASCENT = ControlConfig(step_size=0.5, num_steps=5, l2=0.1)
ADVANTAGE = ControlConfig("advantage", step_size=0.5)
STATIC = ControlConfig("static", step_size=0.5)
PROMPT = "w5 w6 w7 w8"
NEW = 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Of each: family, hook point, layer, control. Layers that give tuples, positions of the mask, caps behind the LM head,
# a projection before it, no attention, no `logits_to_keep`.
CASES = [
    ("llama", "lm_head", -1, ADVANTAGE),
    ("llama", "decoder_layer", -1, replace(ASCENT, plausibility=0.3)),
    ("llama", "decoder_layer", 1, ASCENT),
    ("gpt2", "lm_head", -1, STATIC),
    ("gpt2", "decoder_layer", 0, ASCENT),
    ("gemma2", "lm_head", -1, replace(ADVANTAGE, plausibility=0.3)),
    ("opt_projected", "decoder_layer", -1, ASCENT),
    ("falcon", "decoder_layer", 1, ASCENT),
    ("bloom", "decoder_layer", -1, ASCENT),
    ("mamba", "lm_head", -1, ADVANTAGE),
    ("xlstm", "decoder_layer", -1, ASCENT),
]


def controlled(family="llama", hook_point="lm_head", layer=-1, control=ADVANTAGE, dtype=torch.float64, **kwargs):
    base = tiny_model(family, dtype)
    return ReControlForCausalLM.from_model(base, tiny_head(base, hook_point, layer, **kwargs), control)


def traced(model, prompt=PROMPT, tokenizer=None, **kwargs) -> Trace:
    return trace(model, tokenizer or tiny_tokenizer(), prompt, **{"max_new_tokens": NEW, **kwargs})


def column(response, name) -> torch.Tensor:
    return torch.tensor([getattr(token, name) for token in response.tokens], dtype=torch.float64)


def ids_of(response, which="drawn") -> list[int]:
    return [getattr(token, which).id for token in response.tokens]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("family", "hook_point", "layer", "control"), CASES, ids=lambda x: x if isinstance(x, str) else None
)
def test_a_trace_is_what_generation_did(family, hook_point, layer, control, temperature):
    model = controlled(family, hook_point, layer, control)
    found = traced(model, temperature=temperature, seed=3)
    drawn = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
    for response, under, own in ((found.base, False, "base_draw"), (found.controlled, control, "controlled_draw")):
        (rollout,) = generate_rollouts(model, tiny_tokenizer(), [PROMPT], control=under, **drawn)
        assert (response.text, ids_of(response), response.finished) == (
            rollout.completion,
            rollout.completion_ids,
            rollout.finished,
        )
        # What was drawn from each state is what its distribution gives with the noise of that place.
        assert ids_of(response, own) == ids_of(response)
        whole = torch.tensor([found.prompt_ids + ids_of(response)])
        start = len(found.prompt_ids) - 1
        values = model.values(whole)[0, start:-1]
        torch.testing.assert_close(column(response, "value_before"), values.double(), **CLOSE)
        kl = column(response, "kl")
        assert (kl > 1e-4).any() and (kl >= -1e-6).all()
        (likelihood,) = likelihoods_in_force(model, [replace(rollout, control=None)])
        assert float(kl.sum()) == pytest.approx(likelihood.kl, rel=1e-5) == pytest.approx(response.nats)
        torch.testing.assert_close(column(response, "nats"), kl.cumsum(0))
        for token in response.tokens:
            shown = {each.id: each for each in token.alternatives}
            assert {token.drawn.id, token.base_draw.id, token.controlled_draw.id} <= shown.keys()
            assert shown[token.drawn.id].controlled == token.drawn.controlled
            assert token.seconds > 0
    assert model.active_control == control, "the settings are as before"


@pytest.mark.parametrize(("hook_point", "control"), [("lm_head", ADVANTAGE), ("decoder_layer", ASCENT)])
@torch.no_grad()
def test_edits_and_probabilities_are_those_of_the_naive_reference(hook_point, control):
    model = controlled("llama", hook_point, -1, control)
    found = traced(model)
    base, head = tiny_model("llama"), copy.deepcopy(model.value_head)
    ids, start = torch.tensor([found.prompt_ids + ids_of(found.controlled)]), len(found.prompt_ids) - 1
    seen = []
    module = base.lm_head if hook_point == "lm_head" else base.model.layers[-1]
    if hook_point == "lm_head":
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda _, args, output: seen.append(output))
    logits = base(**full_inputs(base, ids)).logits[0, start:-1]
    states = seen[0][:, start:-1]
    edits = reference_edit(head, states, control)[0]
    torch.testing.assert_close(column(found.controlled, "edit"), edits.norm(dim=-1), **CLOSE)
    torch.testing.assert_close(
        column(found.controlled, "edit_relative"), edits.norm(dim=-1) / states[0].norm(dim=-1), **CLOSE
    )
    after = head.rewards(head(states[0] + edits))
    torch.testing.assert_close(column(found.controlled, "value_after"), after, **CLOSE)
    own = reference_logits(tiny_model("llama"), head, ids, control=control)[0, start:-1]
    for place, token in enumerate(found.controlled.tokens):
        for each in token.alternatives:
            assert each.base == pytest.approx(float(logits[place].softmax(-1)[each.id]), rel=1e-4, abs=1e-7)
            assert each.controlled == pytest.approx(float(own[place].softmax(-1)[each.id]), rel=1e-4, abs=1e-7)
        assert token.alternatives[0].id == int(own[place].argmax())
        assert token.base_draw.id == int(logits[place].argmax())


def test_the_base_draws_with_the_same_noise():
    model = controlled()
    found = traced(model, temperature=1.0, seed=5)
    ids, start = torch.tensor([found.prompt_ids + ids_of(found.controlled)]), len(found.prompt_ids) - 1
    with torch.no_grad():
        scores = tiny_model("llama")(ids).logits[0, start:-1].float()
    sampler = RowSampler([response_seed(5, 0, 0)], scores.device)
    assert ids_of(found.controlled, "base_draw") == [int(sampler(None, row[None]).argmax()) for row in scores]
    assert ids_of(found.controlled, "base_draw") != ids_of(found.controlled)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("off", [False, ControlConfig("advantage", step_size=0.0)])
def test_control_that_is_off_does_nothing(off, temperature):
    found = traced(controlled(), control=off, temperature=temperature)
    assert (found.control, found.parts_at) == (None, None)
    plain = [
        {name: value for name, value in vars(token).items() if name != "seconds"} for token in found.controlled.tokens
    ]
    assert plain == [
        {name: value for name, value in vars(token).items() if name != "seconds"} for token in found.base.tokens
    ]
    for token in found.controlled.tokens:
        assert (token.edit, token.edit_relative, token.kl, token.nats) == (0.0, 0.0, 0.0, 0.0)
        assert (token.value_before, token.base_draw) == (token.value_after, token.controlled_draw)
        assert all(each.base == each.controlled for each in token.alternatives)


def test_values_are_those_of_a_row_in_a_padded_batch():
    for family in ("llama", "gpt2"):
        model = controlled(family)
        found = traced(model)
        row = torch.tensor(found.prompt_ids + ids_of(found.controlled))
        ids, mask = left_pad([row, torch.arange(1, 20)])
        values = model.values(ids, mask)[0, -NEW - 1 : -1]
        torch.testing.assert_close(column(found.controlled, "value_before"), values, **CLOSE)


def test_a_mixture_tells_v_of_each_head_that_acts():
    model = controlled()
    one, two = model.value_head, tiny_head(tiny_model("llama"), "lm_head", num_objectives=2, seed=1)
    one.config.training = TrainingRecord(rewards=["kind"])
    model.add_value_head("other", two)
    model.add_value_head("idle", copy.deepcopy(one))
    found = traced(model, value_heads={"default": 0.5, "other": 1.0})
    assert found.heads == {"default": 0.5, "other": 1.0}
    assert found.objectives == ["default: kind", "other: V1", "other: V2"]
    whole = torch.tensor([found.prompt_ids + ids_of(found.controlled)])
    values = torch.cat([model.values(whole, value_head=name) for name in ("default", "other")], dim=-1)
    torch.testing.assert_close(
        column(found.controlled, "value_before"), values[0, len(found.prompt_ids) - 1 : -1], **CLOSE
    )
    assert model.active_value_heads == {"default": 1.0}
    assert traced(model).objectives == ["kind"]


def test_chats_and_short_dtypes_and_stop_strings():
    base = tiny_model("llama", torch.bfloat16, vocab_size=300, max_position_embeddings=256)
    model = ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head").float(), ADVANTAGE)
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    found = traced(model, chat, chatml_tokenizer())
    assert found.prompt == chat and len(found.controlled.tokens) == NEW
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    first = traced(controlled()).controlled.tokens[1].drawn.text.strip()
    stopped = traced(controlled(), stop_strings=[first])
    assert stopped.controlled.finished and len(stopped.controlled.tokens) == 2


def count_sixes(completions: list[str], **columns) -> list[float]:
    """How often w6 stands in it."""
    return [float(text.split().count("w6")) for text in completions]


def unless_short(completions: list[str], **columns) -> list[float | None]:
    """Nothing of one or two words."""
    return [float(len(text.split())) if len(text.split()) > 2 else None for text in completions]


def test_rewards_of_the_response_so_far():
    model, tokenizer = controlled(), tiny_tokenizer()
    found = traced(model, temperature=1.5, seed=3, reward=[count_sixes, len_of_prompt])
    assert found.rewards == ["count_sixes", "len_of_prompt"]
    for response in (found.base, found.controlled):
        ids = ids_of(response)
        for place, token in enumerate(response.tokens, 1):
            so_far = tokenizer.decode(ids[:place], skip_special_tokens=True)
            assert token.reward_so_far == [*count_sixes([so_far]), float(len(PROMPT))]
    partly = traced(model, temperature=1.5, seed=3, reward=[unless_short, count_sixes]).controlled.tokens
    assert [token.reward_so_far[0] for token in partly] == [None, None, 3.0, 4.0, 5.0, 6.0]
    assert all(token.reward_so_far[1] is not None for token in partly)
    plain = traced(model, temperature=1.5, seed=3)
    assert plain.rewards == [] and all(token.reward_so_far == [] for token in plain.controlled.tokens)
    with pytest.raises(ValueError, match="absent"):
        traced(model, reward="absent:function")
    with pytest.raises(ValueError, match="answer"):
        traced(model, reward=needs_a_column)


@pytest.mark.parametrize(
    "says",
    [
        lambda completions: [None for _ in completions],
        lambda completions: [float("nan") for _ in completions],
        lambda completions: [0.5],
        lambda completions: [1 / (len(text.split()) - 2) for text in completions],
    ],
    ids=["nothing", "NaN", "too few", "fails"],
)
def test_a_reward_that_says_nothing_costs_no_trace(says, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_recontrol"), "propagate", True)

    def broken(completions, **columns):
        return says(completions)

    found = traced(controlled(), reward=[count_sixes, broken])
    assert found.rewards == ["count_sixes", "broken"]
    for token in [*found.base.tokens, *found.controlled.tokens]:
        assert isinstance(token.reward_so_far[0], float) and token.reward_so_far[1] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_rewards_are_asked_once_for_each_response_and_outside_of_the_trace_s_control():
    model, seen = controlled(control=ADVANTAGE), []

    def reward(completions, **columns):
        seen.append((len(completions), model.active_control))
        return [0.0 for _ in completions]

    traced(model, control=False, reward=reward)
    assert seen == [(NEW, ADVANTAGE), (NEW, ADVANTAGE)]


def test_a_v_that_overflows_is_an_error():
    model = controlled(dtype=torch.float32)
    model.value_head.config = replace(model.value_head.config, reward_std=3e38)
    with torch.no_grad():
        model.value_head.value_mlp.layers[-1].bias.fill_(1e3)
    with pytest.raises(FloatingPointError, match="V is no finite number"):
        traced(model)


def len_of_prompt(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The length of what was asked."""
    return [float(len(prompt)) for prompt in prompts]


def needs_a_column(completions: list[str], answer: list[str], **columns) -> list[float]:
    """What a prompt alone has not."""
    return [0.0 for _ in completions]


def test_what_cannot_be_traced_is_refused():
    model = controlled()
    with pytest.raises(TypeError, match="controlled model, got LlamaForCausalLM"):
        traced(tiny_model("llama"))
    with pytest.raises(ValueError, match="A value for each prompt"):
        traced(model, control=replace(ADVANTAGE, step_size=(0.5, 1.0)))
    with pytest.raises(ValueError, match="prompt"):
        traced(model, "")
    with pytest.raises(ValueError, match="the model has room for 64"):
        traced(model, "w5 " * 60)
    with pytest.raises(ValueError, match="no `logits_to_keep`"):
        traced(controlled("xlstm", "decoder_layer", 0, ASCENT))
    with pytest.raises(ValueError, match="needs a head with an advantage part"):
        traced(controlled("llama", "decoder_layer", -1, ASCENT), control=ADVANTAGE)
    with pytest.raises(TypeError, match="no setting 'num_samples'"):
        traced(model, num_samples=2)


def test_logits_that_are_no_numbers_are_an_error():
    model = controlled(dtype=torch.float32)
    traced(model)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        traced(model)


def test_edits_are_read_in_this_block_alone():
    model, ids = controlled(), torch.tensor([[5, 6, 7]])
    with torch.no_grad(), read_edits(model) as edits:
        model(ids)
        with model.disable_control():
            model(ids)
        model(ids, logits_to_keep=1)
    with torch.no_grad():
        model(ids)
    assert [tuple(before.shape) for before, _ in edits] == [(1, 3, 16), (1, 1, 16)]
    assert all(not torch.equal(before, after) for before, after in edits)


def test_texts_of_tokens_make_the_text():
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    for text in ("Grüße, 世界 🙂", "a\n\n b", "🙂"):
        ids = tokenizer(text)["input_ids"]
        pieces = texts.of_response(ids)
        assert (len(pieces), "".join(pieces)) == (len(ids), text)
    assert "" in pieces, "a part of a character has no text"
    broken = tokenizer("🙂")["input_ids"][:2]
    assert "".join(texts.of_response(broken)) == tokenizer.decode(broken)
    assert TokenTexts(tiny_tokenizer()).of_response([5, 6, 2]) == ["w5", " w6", " <end>"]
    assert TokenTexts(tiny_tokenizer()).alone(6) == " w6"


# --- the page ---

EVIL = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"><!-- & \u2028"


def evil() -> Trace:
    chances = [TokenChance(i, f"{EVIL}{i}", 0.5, 0.25) for i in range(3)]
    numbers = ([0.1, 1.0], [0.2, 2.0], 1.0, 0.5, 0.1, 0.3)
    tokens = [TracedToken(chances[i], chances[0], chances[i], *numbers, chances, 0.01) for i in range(3)]
    response, other = TracedResponse(EVIL, True, tokens), TracedResponse("", True, [])
    return Trace(
        prompt=[{"role": EVIL, "content": EVIL}],
        prompt_ids=[1],
        base=other,
        controlled=response,
        model=EVIL,
        hook_point="the LM head",
        control={"method": "ascent", "step_size": 0.5},
        heads={EVIL: 1.0, "two": 2.0},
        objectives=[EVIL, "two"],
        temperature=1.0,
        seed=0,
    )


class _Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.handlers, self.data = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        if self.lasttag == "script" and not self.data:
            self.data = data


@pytest.mark.parametrize("make", [evil, lambda: traced(controlled())], ids=["evil", "real"])
def test_the_page_holds_the_record_and_runs_nothing_else(make, tmp_path):
    found = make()
    page, record = write_trace(found, tmp_path / "out")
    source = page.read_text(encoding="utf-8")
    parsed = _Tags(source)
    assert json.loads(parsed.data) == json.loads(record.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert (parsed.tags.count("script"), "img" in parsed.tags, parsed.handlers) == (2, False, [])
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" in source
    # Texts aside it names nothing to load.
    own = pages.trace_page(replace(evil(), prompt="", model="", heads={}, objectives=[], controlled=evil().base))
    assert not re.search(r"src=|href=|url\(|@import|fetch\(|XMLHttpRequest", own)


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = evil()
    assert write_trace(found, "a/b.html") == write_trace(found, "a/b.json") == (Path("a/b.html"), Path("a/b.json"))
    assert write_trace(found, "a") == (Path("a/trace.html"), Path("a/trace.json"))
    assert sorted(path.name for path in Path("a").iterdir()) == ["b.html", "b.json", "trace.html", "trace.json"]
    for text in ('{"mine": 1}', "[]", "not json"):
        Path("data.json").write_text(text)
        with pytest.raises(OSError, match=r"data\.json is no trace"):
            write_trace(found, "data.html")
        assert Path("data.json").read_text() == text and not Path("data.html").exists()
    Path("mine.html").write_bytes(b"<p>\xffmine")
    with pytest.raises(OSError, match=r"mine\.html is no trace"):
        write_trace(found, "mine.html")
    assert Path("mine.html").read_bytes() == b"<p>\xffmine" and not Path("mine.json").exists()
    with pytest.raises(OSError, match="is a file"):
        write_trace(found, "data.json/below")
    Path("folder.html").mkdir()
    with pytest.raises(OSError, match="is a folder"):
        write_trace(found, "folder.html")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(page: Path, folder: Path, *wanted: str) -> str:
    """What a browser says of a page after its script has run, without a network; by default the document."""
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words += ["--proxy-server=127.0.0.1:9", "--timeout=5000", *(wanted or ["--dump-dom"]), page.as_uri()]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=100).stdout


in_a_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium or Chrome is installed, which would run the page"
)


@in_a_browser
def test_the_colours_of_the_heat_map_are_on_the_screen(tmp_path):
    image = pytest.importorskip("PIL.Image")
    found = traced(controlled())
    page, _ = write_trace(found, tmp_path)
    browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,900", "--hide-scrollbars")
    with image.open(tmp_path / "page.png") as opened:
        counts = opened.convert("RGB").getcolors(maxcolors=2**24)
    high = [int(part) for part in HIGH.split(",")]
    kl = [token.kl for response in (found.base, found.controlled) for token in response.tokens]
    # White is a card's own colour.
    wanted = {tuple(255 + share / max(kl) * OPACITY * (part - 255) for part in high) for share in kl}
    assert len(wanted) > 5
    for colour in wanted:
        alike = [n for n, seen in counts if all(abs(x - y) < 2 for x, y in zip(seen, colour, strict=True))]
        assert sum(alike) > 50, colour


@in_a_browser
def test_the_page_in_a_browser(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "SCRIPT", pages.SCRIPT + '\ntell("controlled", 1);\n')
    page, _ = write_trace(traced(controlled(), reward=unless_short), tmp_path)
    found = browse(page, tmp_path)
    assert len(re.findall('<span class="token', found)) == 2 * NEW
    assert len(re.findall(r"background-color: rgba\(", found)) == 2 * NEW
    assert found.count("<svg") == 6 and found.count("Reward so far, unless_short") == 1
    assert 'id="tool"' in found and 'id="tool" hidden' not in found
    tip = found[found.index('id="tip"') :]
    assert "token 2, id" in tip and "spent so far" in tip and tip.count("<tr") > 5
    page, _ = write_trace(evil(), tmp_path / "evil")
    found = browse(page, tmp_path)
    assert "<title>What control did</title>" in found and "<img" not in found
    assert "token 2, id 1" in found and found.count("<svg") == 2
    assert "Critic" not in found[: found.index("<script")]
    # Where two rewards have a value each and one critic is there.
    tokens = [replace(token, critic=[0.5, None]) for token in evil().controlled.tokens]
    page, _ = write_trace(replace(evil(), controlled=TracedResponse(EVIL, True, tokens)), tmp_path / "critic")
    found = browse(page, tmp_path)
    assert found.count('type="radio"') == 6 and 'value="critic"' in found
    assert "it, and the critic (dotted)</figcaption>" in found
    assert len(re.findall(r"<dt>Critic, [^<]*</dt><dd>0.5</dd>", found)) == 1
    assert found.count("<polyline") == 1 + 3


def test_the_command(tmp_path, monkeypatch):
    base = tiny_model("llama", torch.float32)
    head = tiny_head(base, "lm_head", control=ADVANTAGE)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")

    monkeypatch.chdir(tmp_path)
    drawn = ["-m", "base", "--max-new-tokens", "5", "--temperature", "0.7", "--seed", "2"]
    words = ["trace", "head", PROMPT, "-o", "out", "--step-size", "2", "--reward", "hf_recontrol:vader", *drawn]
    code, out, err = run_fresh(RECONTROL, words, os.environ, timeout=120)
    assert (code, "Traceback" in err) == (0, False), err
    record = json.loads(Path("out/trace.json").read_text())
    assert (record["control"]["step_size"], record["seed"], record["temperature"]) == (2.0, 2, 0.7)
    assert record["rewards"] == ["vader"] and all(len(each["reward_so_far"]) == 1 for each in record["base"]["tokens"])
    assert f"# controlled\n{record['controlled']['text']}\n" in out and "out/trace.html" in out
    # The same as `generate` says.
    said = CliRunner().invoke(app, ["generate", "head", PROMPT, "--step-size", "2", *drawn]).stdout
    assert said.strip() == record["controlled"]["text"]
    Path("mine.json").write_text("{}")
    # Before the base is loaded.
    for prompt, output, reward, error in (
        ("  ", "other", "hf_recontrol:vader", "empty"),
        (PROMPT, "mine.html", "hf_recontrol:vader", "mine.json is no trace"),
        (PROMPT, "other", "hf_recontrol:absent", "absent"),
    ):
        words = ["trace", "head", prompt, "-o", output, "-m", "absent", "--reward", reward]
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 1 and error in str(found.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "head", "mine.json", "out"]
