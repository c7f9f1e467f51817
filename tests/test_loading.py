"""One way to load a base, for commands, `fit`, the wrapper and lm-eval: what it takes, and what it refuses."""

import json
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForSequenceClassification, QuantoConfig

from hf_recontrol import FitSettings, LoadingSettings, ReControlForCausalLM, ValueHead, fit, generate_rollouts
from hf_recontrol.cli.app import own_command
from hf_recontrol.collection.scoring.rewards import load_reward
from hf_recontrol.heads.base_model import load_base_model
from hf_recontrol.pipelines.loading import base_with_head, load_base
from hf_recontrol.pipelines.run_file import load_run, save_run
from hf_recontrol.utils.files import check_target, make_folder

from .hub_server import TOKEN
from .tiny_models import tiny_head, tiny_model
from .tiny_tokenizer import tiny_tokenizer

PROMPTS = [f"w{i} w{i + 1}" for i in range(5, 45)]
SMALL = {
    "num_samples": 2,
    "max_new_tokens": 4,
    "temperature": 1.5,
    "head_sizes": [8],
    "advantage_sizes": [4],
    "num_epochs": 2,
    "advantage_num_epochs": 1,
    "quiet": True,
}


def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


def saved(model, folder):
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny_model("llama", torch.float32), tmp_path_factory.mktemp("llama"))


def gemma3():
    text = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "query_pre_attn_scalar": 4}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.usefixtures("recontrol_warnings")
@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_model_that_takes_images_goes_from_its_name_to_controlled_text_everywhere(kind, tmp_path):
    model = gemma3() if kind == "gemma3" else tiny_model("llava", torch.float32)
    name = str(saved(model, tmp_path / "base"))
    fit(name, PROMPTS, variety, tmp_path / "run", **SMALL)
    head = ValueHead.from_pretrained(tmp_path / "run" / "head")
    assert head.config.base_model_name_or_path == name
    expected = generate_rollouts(
        ReControlForCausalLM.from_model(model, head),
        tiny_tokenizer(),
        PROMPTS[:3],
        max_new_tokens=6,
        control=head.config.control,
    )
    controlled = ReControlForCausalLM.from_pretrained(tmp_path / "run" / "head")
    found = generate_rollouts(controlled, tiny_tokenizer(), PROMPTS[:3], max_new_tokens=6, control=controlled.control)
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    pytest.importorskip("lm_eval")
    from hf_recontrol.integrations.lm_eval import ReControlLM

    evaluated = ReControlLM(str(tmp_path / "run" / "head"), device="cpu")
    assert type(evaluated.model).__name__ == type(model).__name__
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(evaluated.model(ids).logits, controlled(ids).logits)


def test_revision_and_token_reach_every_file_and_the_token_is_written_nowhere(hub, run, llama, tmp_path):
    saved(tiny_model("llama", torch.float32, seed=9), tmp_path / "other")
    hub.put("org/base", tmp_path / "other", private=True)
    hub.put("org/base", llama, branch="v1")
    script = """
import sys, json, torch
torch.set_num_threads(1)
from hf_recontrol import ValueHead, fit, load_rollouts
from hf_recontrol.cli import main

def variety(prompts, completions, **columns):
    return [float(len(set(text.split()))) for text in completions]

base, token, prompts, small = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
sampled = ["rollout", "-m", base, "--prompts", "prompts.jsonl", "--max-new-tokens", "6", "-o"]
fit(base, prompts, variety, "run", revision="v1", token=token, **small)
for arguments in (
    ["generate", "run/head", "w5 w6", "--token", token, "--max-new-tokens", "5"],
    [*sampled, "plain", "--revision", "v1", "--token=" + token],
    [*sampled, "under", "--revision", "v1", "--head", "run/head",
     "--token", token],
    [*sampled, "other", "--token", token],
):
    sys.argv = ["recontrol", *arguments]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, arguments
texts = {name: [r.completion for r in load_rollouts(name)] for name in ("plain", "under", "other")}
print("RESULT" + json.dumps([ValueHead.from_pretrained("run/head").config.base_model_revision, texts]))
"""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS[:4]))
    arguments = ["org/base", TOKEN, json.dumps(PROMPTS), json.dumps(SMALL)]
    inside = f"import os; os.chdir({str(tmp_path)!r})\n{script}"
    output = run(inside, *arguments, endpoint=hub.endpoint, token=None)
    revision, texts = json.loads(output.split("RESULT")[1])
    assert revision == hub.repos["org/base"].commit_hash("v1")
    expected = generate_rollouts(load_base_model(llama), tiny_tokenizer(), PROMPTS[:4], max_new_tokens=6)
    assert texts["plain"] == [r.completion for r in expected]
    assert texts["under"] != texts["plain"] != texts["other"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()], (
        "the token is in a file"
    )


def test_a_token_is_never_shown(monkeypatch):
    settings = FitSettings(token=TOKEN)
    assert TOKEN not in repr(settings) + json.dumps(settings.to_dict()) and settings.token == TOKEN
    with pytest.raises(TypeError, match="`token` must be a text, got list"):
        LoadingSettings(token=[TOKEN])
    for form in (["--token", TOKEN], [f"--token={TOKEN}"]):
        monkeypatch.setattr(sys, "argv", ["/usr/bin/recontrol", "fit", *form, "-o", "/tmp/run"])
        assert own_command() == "recontrol fit -o run"
    for secret in ({"hub_token": TOKEN}, {"hf_token": TOKEN}):
        with pytest.raises(ValueError, match=r"must hold no '.*_token': a token of the Hub belongs into HF_TOKEN"):
            FitSettings(training_arguments=secret)


def test_a_command_names_no_whole_path_however_it_was_written(monkeypatch):
    words = ["--prompts=/home/alice/p.jsonl", "-o/tmp/run", "/tmp/x", "--seed=3", "a=/b", "-m", "org/base"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/recontrol", "fit", *words])
    assert own_command() == "recontrol fit --prompts=p.jsonl -orun x --seed=3 a=/b -m org/base"


def test_a_comparison_takes_the_base_at_the_revision_that_its_head_names(monkeypatch, tmp_path):
    head = tiny_head(tiny_model("llama"))
    head.config.base_model_name_or_path, head.config.base_model_revision = "org/base", "c0ffee"
    asked = []

    def load(name, settings, value_head=None, tokenizer=None):
        asked.append((name, settings.revision))
        return tiny_model("llama"), tiny_tokenizer()

    monkeypatch.setattr("hf_recontrol.pipelines.loading.load_base", load)
    for base, settings, expected in [
        (None, LoadingSettings(), ("org/base", "c0ffee")),
        (None, LoadingSettings(revision="main"), ("org/base", "main")),
        ("org/other", LoadingSettings(), ("org/other", None)),
    ]:
        with base_with_head(base, head, None, settings):
            assert asked.pop() == expected
    head.source, head.config.base_model_name_or_path = {"pretrained_model_name_or_path": "user/head"}, str(tmp_path)
    with pytest.raises(ValueError, match="comes from the Hub and names a base that does not"):
        base_with_head(None, head, None, LoadingSettings()).__enter__()


def test_nothing_is_written_to_a_folder_that_is_called_like_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (make_folder, check_target):
        with pytest.raises(OSError, match="would be a folder that is called '~'"):
            write("~/run")
    assert not list(tmp_path.iterdir())


def test_code_of_the_base_s_own_runs_if_it_is_trusted(tmp_path):
    saved(tiny_model("llama", torch.float32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(tmp_path, LoadingSettings())
    model, _ = load_base(tmp_path, LoadingSettings(trust_remote_code=True))
    assert type(model).__name__ == "MineForCausalLM"
    controlled, _ = load_base(tmp_path, LoadingSettings(trust_remote_code=True), tiny_head(tiny_model("llama")))
    assert isinstance(controlled, ReControlForCausalLM) and type(controlled).__name__ == "MineForCausalLM"


@pytest.mark.parametrize("form", ["json", "object"])
def test_a_base_is_quantised_as_it_is_loaded(form, llama):
    pytest.importorskip("optimum.quanto")
    config = {"quant_method": "quanto", "weights": "int8"} if form == "json" else QuantoConfig(weights="int8")
    settings = LoadingSettings(quantization_config=config, dtype="float32")
    assert settings.to_dict()["quantization_config"]["weights"] == "int8"
    for head in (None, tiny_head(tiny_model("llama"))):
        model, _ = load_base(llama, settings, head)
        assert type(model.model.layers[0].mlp.up_proj).__name__ == "QLinear"
        assert type(model.lm_head) is torch.nn.Linear


def test_where_a_base_computes(llama):
    pytest.importorskip("accelerate")
    ids = torch.tensor([[5, 6, 7]])
    for settings in (LoadingSettings(device_map="auto"), LoadingSettings(device="cpu")):
        model, _ = load_base(llama, settings)
        assert not model.training
        torch.testing.assert_close(model(ids).logits, load_base_model(llama)(ids).logits)
    with pytest.raises(ValueError, match="to spread the base, use `device_map`"):
        LoadingSettings(device="auto")
    with pytest.raises(ValueError, match="use one of them"):
        LoadingSettings(device="cpu", device_map="auto")
    for device in ("cuda:99", "toaster"):
        with pytest.raises(ValueError, match=f"`device` must be one that torch has here, got '{device}'"):
            load_base(llama, LoadingSettings(device=device))


def test_files_that_lack_weights_are_refused_by_every_loader(llama, tmp_path):
    """A classifier has no LM head: transformers would make a random one."""
    config = AutoConfig.from_pretrained(llama)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    head = tiny_head(tiny_model("llama", torch.float32), "lm_head")
    pytest.importorskip("lm_eval")
    from hf_recontrol.integrations.lm_eval import ReControlLM

    head.save_pretrained(tmp_path / "head")
    for load in (
        lambda: load_base_model(tmp_path),
        lambda: load_base(tmp_path, LoadingSettings()),
        lambda: ReControlForCausalLM.from_pretrained(tmp_path, value_head=head),
        lambda: fit(str(tmp_path), PROMPTS, variety, tmp_path / "run", **SMALL),
        lambda: ReControlLM(str(tmp_path), value_head=str(tmp_path / "head"), device="cpu"),
    ):
        with pytest.raises(ValueError, match=r"lack 1 weights of LlamaForCausalLM \(lm_head\.weight\)"):
            load()


def test_settings_about_loading_are_refused_for_a_model_that_is_loaded(tmp_path):
    model = tiny_model("llama", torch.float32)
    for name, value in {"revision": "v1", "dtype": "bfloat16", "trust_remote_code": True}.items():
        with pytest.raises(ValueError, match=f"`{name}` is about loading a base, this one is loaded"):
            fit(model, PROMPTS, variety, tmp_path / "run", tokenizer=tiny_tokenizer(), **SMALL | {name: value})


def test_a_run_of_a_loaded_model_is_repeated_at_its_commit(tmp_path):
    model = tiny_model("llama", torch.float32)
    model.config._name_or_path, model.config._commit_hash = "org/base", "0a1b2c"
    save_run(tmp_path, model, PROMPTS, [variety], [variety], FitSettings(token=TOKEN), tokenizer=True)
    written = load_run(tmp_path / "fit.yaml")
    assert (written["model"], written["revision"]) == ("org/base", "0a1b2c")
    text = (tmp_path / "fit.yaml").read_text()
    assert TOKEN not in text and "give it again, or set HF_TOKEN" in text


def test_a_column_reward_is_written_as_one_also_where_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score").mkdir()
    for given in ("score", "column:score"):
        column = load_reward(given, {"score"})
        save_run(tmp_path, "org/base", PROMPTS, [given, variety], [column, variety], FitSettings(), tokenizer=False)
        assert load_run(tmp_path / "fit.yaml")["reward"][0] == "column:score"
    for given, written in [("score#GOOD", f"{tmp_path / 'score'}#GOOD"), ("org/judge#GOOD", "org/judge#GOOD")]:
        save_run(tmp_path, "org/base", PROMPTS, [given], [variety], FitSettings(), tokenizer=False)
        assert load_run(tmp_path / "fit.yaml")["reward"] == [written]


def test_lm_eval_takes_no_token_since_it_would_write_it_down(llama):
    pytest.importorskip("lm_eval")
    from hf_recontrol.integrations.lm_eval import ReControlLM

    with pytest.raises(TypeError, match="set HF_TOKEN"):
        ReControlLM(str(llama), value_head="me/head", token=TOKEN)


def test_a_base_that_was_given_is_afterwards_in_the_mode_it_was_in():
    model = tiny_model("llama", torch.float32).train()
    frozen = model.model.layers[0].eval()
    for head in (None, tiny_head(model)):
        with base_with_head(model, head, tiny_tokenizer(), LoadingSettings()) as (used, _):
            assert not any(part.training for part in used.modules())
        assert model.training and not frozen.training and not frozen.mlp.training and model.model.layers[1].training


def test_a_head_whose_base_has_moved_says_how_to_name_it(tmp_path):
    head = tiny_head(tiny_model("llama"))
    head.config.base_model_name_or_path = str(tmp_path / "gone")
    head.save_pretrained(tmp_path / "head")
    said = r"gone, which is not there: name the base yourself, .*value_head='.*head'.*--model"
    with pytest.raises(OSError, match=said):
        ReControlForCausalLM.from_pretrained(tmp_path / "head")
    with pytest.raises(OSError, match=said), base_with_head(None, tmp_path / "head", None, LoadingSettings()):
        pass
