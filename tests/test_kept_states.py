"""States kept while sampling are those that a forward of its own reads afterwards."""

from contextlib import nullcontext

import pytest
import torch
from transformers import GenerationConfig

import hf_recontrol.collection.kept_states
import hf_recontrol.evaluation.likelihoods
from hf_recontrol import ControlConfig, ReControlForCausalLM, SamplingSettings, ValueHeadConfig
from hf_recontrol.collection.kept_states import KEPT_FOLDER, remove_kept
from hf_recontrol.collection.rollouts import write_rollouts
from hf_recontrol.collection.scoring.labels import label_rollouts
from hf_recontrol.collection.states import write_states
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.states import StateStore
from hf_recontrol.evaluation.comparison.answers import Drawer
from hf_recontrol.evaluation.comparison.entries import Entry, Row
from hf_recontrol.evaluation.rivals.kinds import make_rival
from hf_recontrol.evaluation.rivals.rival import Bench
from hf_recontrol.pipelines.fit import fit

from .conftest import at, make_head
from .tiny_models import layers_of, lm_head_of, tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

AT_HEAD = ValueHeadConfig(16, hook_point="lm_head", advantage_sizes=[])
PROMPTS = [f"w{i} w{i + 1} w{3 * i}" + " w9" * (i % 4) for i in range(5, 17)]
OPTIONS = {"num_samples": 2, "max_new_tokens": 8, "part_size": 10, "batch_size": 4, "temperature": 1.5}


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def base(family="llama"):
    model = tiny_model(family, dtype=torch.float32)
    # So many that rows of a batch end at different tokens.
    model.generation_config.eos_token_id = list(range(20, 32))
    return model


def sample(folder, model, keep=AT_HEAD, **changes):
    if keep is not None:
        changes = {"keep_states": True, **at(keep)} | changes
    counts = write_rollouts(folder, model, tiny_tokenizer(), load_prompts(PROMPTS), **OPTIONS | changes)
    label_rollouts(folder, [length])
    return counts


def forwards(model, work):
    """How often the model runs in `work`."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    work()
    handle.remove()
    return len(calls)


def assert_same(one, two, scale=1e-4, states=20):
    stores = [StateStore.open(folder) for folder in (one, two)]
    assert stores[0].read_at == stores[1].read_at and stores[0].num_states > states
    for name in ("lengths", "rewards", "prompts", "finished"):
        assert torch.equal(getattr(stores[0], name), getattr(stores[1], name))
    assert stores[0].has_directions == stores[1].has_directions
    everything = torch.arange(len(stores[0]))
    for name in ("hidden", "directions")[: 1 + stores[0].has_directions]:
        found, expected = (store.gather(name, everything) for store in stores)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=scale * float(expected.abs().max()))


PLACES = [AT_HEAD, ValueHeadConfig(16, hook_point="lm_head"), ValueHeadConfig(16), ValueHeadConfig(16, layer=0)]
MODES = {
    "sampled": {},
    "greedy": {"temperature": 0.0, "num_samples": 1},
    "penalty": {"generation_config": GenerationConfig(do_sample=True, top_k=5, repetition_penalty=1.5)},
    "stop string": {"stop_strings": ["w7", "w3", "w11"]},
}


@pytest.mark.usefixtures("recontrol_warnings")
@pytest.mark.parametrize("config", PLACES, ids=["directions", "lm_head", "last", "first"])
@pytest.mark.parametrize(
    ("family", "mode"), [("llama", mode) for mode in MODES] + [("gemma2", "sampled"), ("mamba", "sampled")]
)
def test_kept_states_are_the_read_ones_and_cost_no_forward(tmp_path, family, mode, config):
    model = base(family)
    sample(tmp_path / "kept", model, config, **MODES[mode])
    sample(tmp_path / "plain", model, None, **MODES[mode])
    kept, plain = load_rollouts(tmp_path / "kept"), load_rollouts(tmp_path / "plain")
    assert kept == plain
    assert len({len(rollout.completion_ids) for rollout in kept}) > 1
    run = {name: tmp_path / f"{name}-states" for name in ("kept", "plain")}
    assert forwards(model, lambda: write_states(run["plain"], model, tmp_path / "plain", **at(config))) > 0
    assert forwards(model, lambda: write_states(run["kept"], model, tmp_path / "kept", **at(config))) == 0
    assert_same(run["kept"], run["plain"])


@pytest.mark.parametrize("plausibility", [0.0, 0.3])
def test_under_control_too(tmp_path, plausibility):
    head = make_head(hidden_size=16, hook_point="lm_head")
    control = ControlConfig(step_size=0.1, plausibility=plausibility)
    model = ReControlForCausalLM.from_model(base(), head, control)
    sample(tmp_path / "kept", model, control=control)
    sample(tmp_path / "plain", model, None, control=control)
    write_states(tmp_path / "plain-states", model, tmp_path / "plain", **at(AT_HEAD))
    made = forwards(model, lambda: write_states(tmp_path / "states", model, tmp_path / "kept", **at(AT_HEAD)))
    assert made == 0
    assert_same(tmp_path / "states", tmp_path / "plain-states")


def test_what_is_missing_is_read(tmp_path):
    model = base()
    sample(tmp_path / "r", model)
    write_states(tmp_path / "whole", model, tmp_path / "r", **at(AT_HEAD))
    files = sorted((tmp_path / "r" / KEPT_FOLDER).iterdir())
    assert len(files) == 7
    for path in files[::2]:
        path.unlink()
    assert forwards(model, lambda: write_states(tmp_path / "half", model, tmp_path / "r", **at(AT_HEAD))) > 0
    assert_same(tmp_path / "half", tmp_path / "whole")


def test_a_run_that_was_stopped_goes_on_with_other_batches(tmp_path):
    model = base()
    done = []

    def stop(count, total):
        done.append(count)
        if count > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(tmp_path / "r", model, progress=stop)
    sample(tmp_path / "r", model, batch_size=3)
    sample(tmp_path / "plain", model, None)
    assert load_rollouts(tmp_path / "r") == load_rollouts(tmp_path / "plain")
    assert forwards(model, lambda: write_states(tmp_path / "s", model, tmp_path / "r", **at(AT_HEAD))) == 0
    write_states(tmp_path / "plain-s", model, tmp_path / "plain", **at(AT_HEAD))
    assert_same(tmp_path / "s", tmp_path / "plain-s")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_other_dtypes_and_every_kth_state(tmp_path, dtype):
    model = base()
    sample(tmp_path / "r", model)
    sample(tmp_path / "plain", model, None)
    for name in ("r", "plain"):
        write_states(tmp_path / f"{name}-s", model, tmp_path / name, **at(AT_HEAD), states_dtype=dtype, every=2)
    assert StateStore.open(tmp_path / "r-s").read_at["every"] == 2
    assert_same(tmp_path / "r-s", tmp_path / "plain-s", scale=2e-2)


def test_states_of_another_place_or_without_directions_are_told_and_read_anew(tmp_path, recontrol_warnings):
    model = base()
    sample(tmp_path / "r", model, ValueHeadConfig(16, hook_point="lm_head"))
    for number, config in enumerate((AT_HEAD, ValueHeadConfig(16), ValueHeadConfig(16, layer=0))):
        made = forwards(
            model, lambda n=number, c=config: write_states(tmp_path / f"s{n}", model, tmp_path / "r", **at(c))
        )
        assert made > 0
        assert StateStore.open(tmp_path / f"s{number}").read_at["hook_point"] == config.hook_point
        assert "of another hook point or model, or lack directions" in recontrol_warnings[number]


def test_states_of_another_model_are_told_and_read_anew(tmp_path, recontrol_warnings):
    model, other = base(), base()
    with torch.no_grad():
        lm_head_of(other).weight.add_(0.1)
    sample(tmp_path / "r", model)
    assert forwards(other, lambda: write_states(tmp_path / "s", other, tmp_path / "r", **at(AT_HEAD))) > 0
    assert any("of another hook point or model" in said for said in recontrol_warnings)


@pytest.mark.usefixtures("recontrol_warnings")
@pytest.mark.parametrize("change", ["weights", "temperature"])
@pytest.mark.parametrize("keep", [None, AT_HEAD], ids=["without", "again"])
def test_states_of_an_earlier_run_in_the_same_folder_are_not_taken(tmp_path, keep, change):
    """Its rollouts were removed, its kept states were not, and tokens may be the same."""
    model, one = base(), {"num_samples": 1, "max_new_tokens": 1}
    sample(tmp_path / "r", model, batch_size=1, **one)
    for path in [*(tmp_path / "r").glob("*.parquet"), tmp_path / "r" / "manifest.json"]:
        path.unlink()
    if change == "weights":
        with torch.no_grad():
            layers_of(model)[-1].mlp.down_proj.weight[3:].mul_(1.01)
    again = one | ({"temperature": 2.5} if change == "temperature" else {})
    sample(tmp_path / "r", model, keep, **again)
    sample(tmp_path / "plain", model, None, **again)
    for name in ("r", "plain"):
        write_states(tmp_path / f"{name}-s", model, tmp_path / name, **at(AT_HEAD))
    assert_same(tmp_path / "r-s", tmp_path / "plain-s", states=10)


@pytest.mark.parametrize("where", [AT_HEAD, ValueHeadConfig(16), ValueHeadConfig(16, layer=1)])
@pytest.mark.parametrize("layer", [0, 1])
def test_control_of_a_middle_layer_is_read_as_it_generated(tmp_path, layer, where):
    """The edit at one position reaches the states of later ones, and prompts are of several lengths."""
    head = make_head(hidden_size=16, layer=layer)
    control = ControlConfig(step_size=0.5, num_steps=3)
    model = ReControlForCausalLM.from_model(base(), head, control)
    sample(tmp_path / "r", model, where, control=control)
    write_states(tmp_path / "kept", model, tmp_path / "r", **at(where))
    remove_kept(tmp_path / "r")
    assert forwards(model, lambda: write_states(tmp_path / "s", model, tmp_path / "r", **at(where))) > 0
    assert_same(tmp_path / "s", tmp_path / "kept")


def test_a_damaged_file_is_named(tmp_path):
    model = base()
    sample(tmp_path / "r", model)
    path = next((tmp_path / "r" / KEPT_FOLDER).iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"{path.name} does not hold kept states .*: remove it, then they are read"):
        write_states(tmp_path / "s", model, tmp_path / "r", **at(AT_HEAD))
    path.unlink()
    write_states(tmp_path / "s", model, tmp_path / "r", **at(AT_HEAD))


def test_what_cannot_be_kept_is_refused_before_anything_is_sampled(tmp_path):
    model = base()
    beams = GenerationConfig(num_beams=2)
    with pytest.raises(ValueError, match="cannot be kept in a beam search"):
        sample(tmp_path / "r", model, generation_config=beams, num_samples=1, temperature=None)
    with pytest.raises(ValueError, match="reads decoder layer 9"):
        sample(tmp_path / "r", model, ValueHeadConfig(16, layer=9))
    with pytest.raises(TypeError, match="`keep_states` must be True or False, got ValueHeadConfig"):
        sample(tmp_path / "r", model, keep_states=AT_HEAD)
    with pytest.raises(TypeError, match="`keep_states` must be True or False, got ValueHeadConfig"):
        fit(model, PROMPTS, length, tmp_path / "r", tokenizer=tiny_tokenizer(), keep_states=AT_HEAD)
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / KEPT_FOLDER).write_text("mine")
    with pytest.raises(OSError, match=f"{KEPT_FOLDER} is a file: name a folder to save in"):
        sample(tmp_path / "r", model)


def test_finished_rollouts_that_kept_nothing_are_told(tmp_path, recontrol_warnings):
    model = base()
    sample(tmp_path / "r", model, None)
    sample(tmp_path / "r", model)
    assert "are finished, so no states are kept" in recontrol_warnings[0]


def test_only_what_was_kept_is_removed(tmp_path):
    model = base()
    sample(tmp_path / "r", model)
    (tmp_path / "r" / KEPT_FOLDER / "mine.txt").write_text("mine")
    remove_kept(tmp_path / "r")
    assert [path.name for path in (tmp_path / "r" / KEPT_FOLDER).iterdir()] == ["mine.txt"]


def test_fit_uses_them_and_leaves_nothing_behind(tmp_path, recontrol_warnings):
    model = base()
    options = {"num_samples": 2, "max_new_tokens": 8, "head_sizes": [16], "advantage_sizes": [8], "quiet": True}
    options |= {"tokenizer": tiny_tokenizer(), "num_epochs": 2}
    prompts = [f"w{i} w{i + 1}" for i in range(5, 45)]
    fit(model, prompts, length, tmp_path / "kept", keep_states=True, **options)
    assert not (tmp_path / "kept" / "rollouts" / KEPT_FOLDER).exists()
    fit(model, prompts, length, tmp_path / "plain", **options)
    assert_same(tmp_path / "kept" / "states", tmp_path / "plain" / "states")
    again = forwards(model, lambda: fit(model, prompts, length, tmp_path / "kept", keep_states=True, **options))
    assert again == 0


# Of a comparison's answers: kind, its settings, those of the sampling, the instruction, and whether they are read from
# what they were drawn from.
ANSWERS = {
    "base": ("base", {}, {}, None, True),
    "best of n": ("best_of_n", {"n": 2}, {}, None, True),
    "advantage": ("advantage", {}, {}, None, True),
    "ascent, greedy": ("ascent", {}, {"temperature": 0.0}, None, True),
    "stop strings": ("static_vector", {}, {"temperature": 0.7, "stop_strings": ("w3",)}, None, True),
    "guarded": ("advantage", {"plausibility": 0.1}, {}, None, False),
    "instructed": ("advantage", {}, {}, "w9", False),
    "beams": ("base", {}, {"generation_config": GenerationConfig(num_beams=2, do_sample=False)}, None, False),
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_projected", "mamba"])
def test_answers_are_read_from_the_states_that_they_were_drawn_from(case, family, tmp_path, monkeypatch):
    kind, own, sampling, instruction, is_kept = ANSWERS[case]
    model = tiny_model(family)
    model = ReControlForCausalLM.from_model(model, tiny_head(model, "lm_head"))
    settings = SamplingSettings(**{"max_new_tokens": 5, "batch_size": 2} | sampling)
    bench = Bench(model, tiny_tokenizer(), settings, {"reward": lambda completions: [0.0]}, tmp_path)
    entry = Entry("row", kind, instruction=instruction, instruction_role="user" if instruction else "system")
    row = Row(entry, make_rival(kind, bench, own), None if kind in ("base", "best_of_n") else 0.05)
    prompts, drawer, found = load_prompts(["w10 w11 w12", "w20", "w30 w31"]), Drawer(bench, perplexity=True), {}

    def draw(name):
        found[name] = drawer.draw(row, prompts)

    read, forced = [], hf_recontrol.evaluation.likelihoods.teacher_forced
    monkeypatch.setattr(
        hf_recontrol.evaluation.likelihoods, "teacher_forced", lambda *a, **k: read.append(1) or forced(*a, **k)
    )
    draw("kept")
    assert row.rival.bench.keep is None
    # gemma2 caps its logits.
    assert (len(read) == 0) == (is_kept and family != "gemma2")
    monkeypatch.setattr(Drawer, "_keeps", lambda self, row: False)
    draw("read")
    assert read
    assert [each.rollout for each in found["kept"][0]] == [each.rollout for each in found["read"][0]]
    for one, other in zip(found["kept"][1], found["read"][1], strict=True):
        for name in ("base", "kl", "log_ratio"):
            number = getattr(other, name)
            assert getattr(one, name) == (number and pytest.approx(number, rel=1e-3, abs=1e-5))


class _Beside(torch.nn.Module):
    """An LM head whose weight is a buffer, as packed ones have it."""

    def __init__(self, lm_head):
        super().__init__()
        self.in_features = lm_head.in_features
        self.register_buffer("packed", lm_head.weight.detach().clone())

    def forward(self, states):
        return states @ self.packed.T


@pytest.mark.parametrize("kind", ["a buffer", "no hook", "no memory"])
def test_answers_whose_states_cannot_be_kept_are_read_again(kind, tmp_path, monkeypatch):
    model = tiny_model("llama")
    if kind == "a buffer":
        model.lm_head = _Beside(model.lm_head)
    settings = SamplingSettings(max_new_tokens=5, batch_size=2)
    bench = Bench(model, tiny_tokenizer(), settings, {"reward": lambda completions: [0.0]}, tmp_path)
    row, prompts = Row(Entry("row", "base"), make_rival("base", bench, {}), None), load_prompts(["w10 w11", "w20"])
    drawer = Drawer(bench, perplexity=True)
    if kind == "no hook":  # as in code that was compiled before
        monkeypatch.setattr(hf_recontrol.collection.kept_states, "read_states", lambda *a, **k: nullcontext([]))
    if kind == "no memory":
        monkeypatch.setattr(hf_recontrol.collection.kept_states, "_MOST_BYTES", 100)
    _, found, _ = drawer.draw(row, prompts)
    monkeypatch.setattr(Drawer, "_keeps", lambda self, row: False)
    _, expected, _ = drawer.draw(row, prompts)
    assert [each.base for each in found] == pytest.approx([each.base for each in expected], rel=1e-4)
