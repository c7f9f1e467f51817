"""Further rounds of `fit`: what each samples under, what its head is trained on, and that any stop is survived."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_recontrol import ControlConfig, FitSettings, ReControlForCausalLM, ValueHead, train_head
from hf_recontrol.data.fingerprints import head_fingerprint
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.data.states import StateStore

from .test_fit import OPTIONS, PROMPTS, hashes, run
from .tiny_models import tiny_head, tiny_model

pytestmark = pytest.mark.usefixtures("recontrol_warnings")

# Of `OPTIONS`, what training takes.
TRAINING = {name: OPTIONS[name] for name in ("head_sizes", "advantage_sizes", "num_epochs")}
# A function of each stage, in which a stop comes.
STAGES = {
    "rollouts": "collection.rollouts._sample",
    "rewards": "collection.scoring.labels.scored_rollouts",
    "states": "collection.states._Reader.read",
    "V": "training.stage.train_value_head",
    "g": "training.stage.fit_advantage",
    "control": "pipelines.fit.recommend_control",
    "report": "pipelines.fit.write_run_report",
}


def plain_base():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture
def base():
    return plain_base()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(plain_base(), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two rounds at once, and the base that they were made with."""
    folder, model = tmp_path_factory.mktemp("two"), plain_base()
    run(model, folder, rounds=2)
    return folder, model


def sampled_under(folder):
    """The settings of a folder of rollouts: the control, and the fingerprints of its heads."""
    settings = read_manifest(folder / "rollouts", "rollouts", "")["settings"]
    return settings["control"], [mark for _, mark in settings["heads"].values()]


def data(folder):
    """The rollouts and states of a round, byte by byte."""
    parts = sorted([*folder.glob("rollouts/part-*"), *folder.glob("states/part-*")])
    return {str(path.relative_to(folder)): path.read_bytes() for path in parts}


def weights(head):
    return load_file(head / "model.safetensors")


def assert_same_head(one, two):
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(two)[name], rtol=1e-4, atol=1e-6)


def test_a_round_is_drawn_and_read_under_the_head_before_it(two):
    folder, _ = two
    assert sampled_under(folder) == (False, [])
    first = ValueHead.from_pretrained(folder / "round-1" / "head")
    assert sampled_under(folder / "round-2") == (first.config.control.to_dict(), [head_fingerprint(first)])

    # w̄ at each state is that of the controlled policy, at the temperature of the draws.
    model, found = ReControlForCausalLM.from_model(plain_base(), first), []
    rollouts, weight = load_rollouts(folder / "round-2" / "rollouts"), model.lm_head.weight.detach()
    for rollout in rollouts:
        with torch.no_grad():
            logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
        policy = torch.softmax(logits[len(rollout.prompt_ids) - 1 : -1] / OPTIONS["temperature"], -1)
        found.append(weight[rollout.completion_ids] - policy @ weight)
    store = StateStore.open(folder / "round-2" / "states")
    directions = store.gather("directions", torch.arange(len(store)))
    torch.testing.assert_close(directions, torch.cat(found), rtol=1e-3, atol=1e-3)


def test_rounds_share_no_noise(two, one):
    folder, _ = two
    seeds = [
        read_manifest(each / "rollouts", "rollouts", "")["settings"]["seed"] for each in (folder, folder / "round-2")
    ]
    # The seed after the run's is that of the controls that are compared.
    assert seeds == [0, 2]


def test_the_head_is_trained_on_the_responses_of_all_rounds(two, tmp_path):
    folder, _ = two
    states = [folder / "states", folder / "round-2" / "states"]
    figures = train_head(tmp_path / "head", states, **TRAINING)
    assert figures == json.loads((folder / "head" / "training.json").read_text())["figures"]
    for name, tensor in weights(tmp_path / "head").items():
        assert torch.equal(tensor, weights(folder / "head")[name])
    assert any(
        not torch.equal(x, weights(folder / "round-1" / "head")[name]) for name, x in weights(folder / "head").items()
    )

    head, store = ValueHead.from_pretrained(folder / "head"), StateStore.open(*states)
    record, counts = head.config.training, [len(StateStore.open(each)) for each in states]
    assert record.responses == len(store) == sum(counts) == 160 and record.prompts == 40
    assert record.states == store.num_states and record.tokens == store.num_states
    assert head.seen_prompts.counts() == {"trained_on": 36, "validated_on": 4, "tuned_on": 0}
    assert (record.control["rounds"], record.control["control"]) == (2, sampled_under(folder / "round-2")[0])
    assert "rounds" not in ValueHead.from_pretrained(folder / "round-1" / "head").config.training.control
    card = (folder / "head" / "README.md").read_text(encoding="utf-8")
    assert "160 responses of the base in 2 rounds under different control (40 prompts" in card
    assert "The last of these controls was `ControlConfig(method=" in card


def test_the_first_round_is_a_run_of_one(two, one):
    folder, model = two
    names = {"rollouts", "states", "head", "report.html", "fit.yaml"}
    assert {path.name for path in one.iterdir()} - {".lock"} == names
    assert {path.name for path in folder.iterdir()} - {".lock"} == names | {"round-1", "round-2"}
    assert data(folder) == data(one) and weights(folder / "round-1" / "head").keys() == weights(one / "head").keys()
    assert_same_head(folder / "round-1" / "head", one / "head")

    untouched, ids = plain_base(), torch.tensor([[5, 6, 7]])
    assert type(model) is type(untouched) and not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, untouched(ids).logits), "the loaded base is as it was"


def test_the_report_says_what_each_round_earned(two, one):
    folder, _ = two
    page = (folder / "report.html").read_text(encoding="utf-8")
    for number, each in enumerate((folder, folder / "round-2"), 1):
        rewards = [rollout.reward[0] for rollout in load_rollouts(each / "rollouts")]
        assert f"Round {number}" in page and f"80 responses, mean reward {sum(rewards) / 80:.3g}" in page
    assert page.count("its head recommends") == page.count("on held-out prompts reward") == 2
    assert "160, " in page and "Round 1" not in (one / "report.html").read_text(encoding="utf-8")


def test_a_finished_run_goes_on_with_further_rounds(base, one, two, tmp_path):
    folder = shutil.copytree(one, tmp_path / "run")
    before, control = data(folder), ValueHead.from_pretrained(folder / "head").config.control
    mine = ControlConfig(control.method, 1.5 * control.step_size)
    head = ValueHead.from_pretrained(folder / "head")
    head.config.control = mine
    head.save_pretrained(folder / "head")
    run(base, folder, rounds=2)
    assert data(folder) == before and sampled_under(folder / "round-2")[0] == mine.to_dict()

    folder = shutil.copytree(two[0], tmp_path / "three")
    before = {name: data(folder / name) for name in (".", "round-2")}
    earlier = hashes(folder / "round-1")
    run(base, folder, rounds=3)
    assert {name: data(folder / name) for name in before} == before and hashes(folder / "round-1") == earlier
    second = ValueHead.from_pretrained(folder / "round-2" / "head")
    assert all(
        torch.equal(x, weights(two[0] / "head")[name]) for name, x in weights(folder / "round-2" / "head").items()
    )
    assert sampled_under(folder / "round-3") == (second.config.control.to_dict(), [head_fingerprint(second)])
    assert ValueHead.from_pretrained(folder / "head").config.training.responses == 240

    before = hashes(folder)
    for rounds in (1, 2):
        with pytest.raises(ValueError, match=rf"holds 3 rounds, and `rounds` is {rounds}: .*`rounds=3`"):
            run(base, folder, rounds=rounds)
    assert hashes(folder) == before

    # Of the first round the head is not made again: the second one's responses were not drawn under that.
    shutil.rmtree(folder / "round-1")
    before = hashes(folder)
    with pytest.raises(ValueError, match=r"round-1/head is missing, .*round-2 were drawn"):
        run(base, folder, rounds=3)
    assert hashes(folder) == before


def test_further_rounds_keep_as_many_states_as_the_first(base, tmp_path, monkeypatch):
    def smallest_every(parts, *sizes):
        return 3 if "round-2" in str(parts[0]) else 2

    monkeypatch.setattr("hf_recontrol.collection.states.smallest_every", smallest_every)
    run(base, tmp_path, rounds=2, max_gigabytes=1.0)
    assert [StateStore.open(each / "states").read_at["every"] for each in (tmp_path, tmp_path / "round-2")] == [2, 2]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_in_the_second_round_loses_nothing(base, one, two, tmp_path, monkeypatch, stage):
    folder, finished = shutil.copytree(one, tmp_path / "run"), two[0]

    def stops(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(f"hf_recontrol.{STAGES[stage]}", stops)
        run(base, folder, rounds=2)
    assert not isinstance(base, ReControlForCausalLM)
    made, earlier = data(folder / "round-2"), hashes(folder / "round-1")
    run(base, folder, rounds=2)
    assert hashes(folder / "round-1") == earlier and data(folder) == data(one)
    again = data(folder / "round-2")
    assert again.keys() == data(finished / "round-2").keys()
    # Rollouts that had no reward yet are written again with it.
    if stage not in ("rollouts", "rewards"):
        assert made.items() <= again.items()
    assert load_rollouts(folder / "round-2" / "rollouts") == load_rollouts(finished / "round-2" / "rollouts")
    assert_same_head(folder / "head", finished / "head")
    control = ValueHead.from_pretrained(folder / "head").config.control
    assert control == ValueHead.from_pretrained(finished / "head").config.control
    # And a finished one is not made again.
    before = hashes(folder)
    for name in list(STAGES.values())[:-1]:
        monkeypatch.setattr(f"hf_recontrol.{name}", None)
    run(base, folder, rounds=2)
    assert hashes(folder) == before


def test_another_target_kl_is_of_the_last_head_alone(base, two, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / "run")
    first, last = (hashes(folder / name) for name in ("round-1", "head"))
    run(base, folder, rounds=2, target_kl=0.3)
    assert hashes(folder / "round-1") == first and hashes(folder / "head") != last
    before = hashes(folder)
    with pytest.raises(ValueError, match=r"training\.num_epochs was 4, is 5"):
        run(base, folder, rounds=2, target_kl=0.3, num_epochs=5)
    assert hashes(folder) == before


def test_without_a_recommended_control_there_is_no_further_round(base, tmp_path, recontrol_warnings):
    run(base, tmp_path, rounds=3, target_kl=1e3)
    assert any("Round 1 of 3 is the last one" in said for said in recontrol_warnings)
    assert {path.name for path in tmp_path.iterdir()} >= {"head", "report.html"} and not list(tmp_path.glob("round-*"))


def test_a_model_under_control_is_that_of_the_first_round(base, tmp_path):
    control = ControlConfig("advantage", step_size=2.0)
    model = ReControlForCausalLM.from_model(base, tiny_head(base, "lm_head"), control)
    head = model.value_head
    run(model, tmp_path, rounds=2)
    assert sampled_under(tmp_path) == (control.to_dict(), [head_fingerprint(head)])
    first = ValueHead.from_pretrained(tmp_path / "round-1" / "head")
    assert sampled_under(tmp_path / "round-2") == (first.config.control.to_dict(), [head_fingerprint(first)])
    assert model.active_control == control and model.value_head is head


def test_what_cannot_be_rounds_is_refused(base, tmp_path):
    for changes, said in (
        ({"rounds": 0}, "`rounds` must be an integer of at least 1"),
        ({"rounds": 1.5}, "`rounds` must be an integer"),
        ({"rounds": 2, "engine": "vllm"}, "Further rounds .* no other engine"),
    ):
        with pytest.raises(ValueError, match=said):
            run(base, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()
    assert FitSettings().rounds == 1


def test_states_that_do_not_go_together_are_named_before_any_work(base, one, tmp_path):
    whole = one / "states"
    for name, changes, said in (
        ("thin", {"every": 2}, r"`every` \(1, 2\)"),
        ("layer", {"hook_point": "decoder_layer", "layer": 1}, r"the hook point \('lm_head', 'decoder_layer'\)"),
        ("undirected", {"directions": False}, r"whether they hold directions \(True, False\)"),
        (
            "prefixes",
            {"prefix_every": 4},
            r"rewards of the response so far \(False, True\), `prefix_every` \(None, 4\)",
        ),
        ("critic", {"critic_layer": 0}, r"the critic's layer \(None, 0\)"),
    ):
        run(base, tmp_path / name, prompts=PROMPTS[:20], seed=1, num_samples=1, num_epochs=1, **changes)
        with pytest.raises(ValueError, match=rf"{whole} and in {tmp_path / name}.*differ in .*{said}"):
            train_head(tmp_path / "head", [whole, tmp_path / name / "states"])
    other = shutil.copytree(tmp_path / "thin" / "states", tmp_path / "rewards")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["source"]["rewards"], manifest["settings"]["model_fingerprint"] = ["length"], "other"
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"the base's fingerprint \(.*the rewards \(\['variety'\], \['length'\]\)"):
        train_head(tmp_path / "head", [whole, other])
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["source"]["sampling"]["temperature"] = 0.5
    manifest["parts"] = manifest["parts"] | {"part-00000.safetensors": "0" * 64}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"differ in .*the temperature of the sampling \([\d.]+, 0\.5\)"):
        train_head(tmp_path / "head", [whole, other])
    with pytest.raises(ValueError, match=rf"{whole} and {whole} hold the same states"):
        train_head(tmp_path / "head", [whole, whole])
    with pytest.raises(ValueError, match="No folder of states is given"):
        train_head(tmp_path / "head", [])
    assert not (tmp_path / "head").exists()
