"""Settings: one name, default and check for Python, YAML and the command."""

import inspect
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from transformers import GenerationConfig
from typer import Typer
from typer.testing import CliRunner

from hf_recontrol import (
    AdvantageSettings,
    CompareSettings,
    FitSettings,
    LabelSettings,
    LoadingSettings,
    PromptSettings,
    RolloutSettings,
    SamplingSettings,
    StatesSettings,
    TrainSettings,
    TuneSettings,
    ValueHead,
    ValueSettings,
    fit,
)
from hf_recontrol.cli import stages
from hf_recontrol.cli.options import with_settings
from hf_recontrol.pipelines.run_file import load_run
from hf_recontrol.utils.setting_fields import default_text
from hf_recontrol.utils.yaml_files import read_yaml, yaml_text

from .fresh import RECONTROL, run_fresh
from .resumable import make_inputs
from .tiny_models import tiny_model
from .tiny_tokenizer import tiny_tokenizer

STAGES = (PromptSettings, LoadingSettings, RolloutSettings, LabelSettings, StatesSettings, TrainSettings)
COMMANDS = {"fit": FitSettings, "rollout": RolloutSettings, "states": StatesSettings, "train": TrainSettings}


def names(cls) -> set[str]:
    return {item.name for item in fields(cls)}


def test_fit_has_every_setting_of_every_stage_and_they_have_all_of_its():
    assert names(FitSettings) == set().union(*map(names, STAGES)) | {"target_kl", "rounds"}
    for cls in STAGES:
        assert isinstance(FitSettings(), cls), "so that fit hands its settings on as they are"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_options_are_the_settings_with_their_defaults_and_texts(command):
    signature = inspect.signature(getattr(stages, command))
    for item in fields(COMMANDS[command]):
        option = signature.parameters[item.name].annotation.__metadata__[0]
        # typer keeps the first declaration of an annotated option as its default.
        assert (option.default, *option.param_decls)[0].split("/")[0] == "--" + item.name.replace("_", "-")
        assert option.help == item.metadata["help"] and option.show_default == default_text(item)
    assert "config" in signature.parameters


@pytest.mark.parametrize("columns", ["80", "120", "300"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_setting(command, columns):
    # Colours for a terminal, which is not one, come with marks between letters.
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": columns, "NO_COLOR": "1"}
    code, shown, _ = run_fresh(RECONTROL, (command, "--help"), environment, timeout=120)
    assert code == 0
    for item in fields(COMMANDS[command]):
        assert re.search(rf"--{item.name.replace('_', '-')}(?![\w-])", shown), item.name


def test_a_flag_can_be_turned_off():
    """`--no-bf16` is the other value of `--bf16`, not another name of it."""
    found = {}
    one = Typer()

    @one.command()
    @with_settings(FitSettings)
    def command(settings: FitSettings) -> None:
        found["settings"] = settings

    for item in fields(FitSettings):
        if isinstance(getattr(FitSettings(), item.name), bool):
            name = item.name.replace("_", "-")
            for flag, value in ((f"--{name}", True), (f"--no-{name}", False)):
                assert CliRunner().invoke(one, [flag]).exit_code == 0
                assert getattr(found["settings"], item.name) is value


def test_yaml_numbers_and_names(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "learning_rate: 1e-4\nnum_epochs: 010\ntemperature: 1\nsplit: 2024-01-01\n"
        "training_arguments: {adam_epsilon: 1e-8}\n"
    )
    values = load_run(path)
    assert values["learning_rate"] == 1e-4 and values["num_epochs"] == 10 and values["split"] == "2024-01-01"
    assert values["training_arguments"] == {"adam_epsilon": 1e-8}
    for text, message in (
        ("seed: 1\nseed: 2", "'seed' stands in it twice"),
        ("num_epochs: 1:30", "`num_epochs` must"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_run(path)


def test_each_setting_has_one_text_with_what_it_does():
    for item in fields(FitSettings):
        text = item.metadata["help"]
        assert len(text) > 8 and (text.endswith(".") or "..." in text)
        assert f"    {item.name}:\n" in FitSettings.__doc__


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bf16": "False"}, TypeError, "`bf16` must be True or False, got 'False'"),
        ({"keep_states": 1}, TypeError, "`keep_states` must be True or False"),
        ({"td_lambda": 1.5}, ValueError, "`td_lambda` must be between 0 and 1"),
        ({"td_lambda": True}, ValueError, "`td_lambda` must be a finite number"),
        ({"learning_rate": 0}, ValueError, "`learning_rate` must be above 0"),
        ({"learning_rate": float("nan")}, ValueError, "`learning_rate` must be a finite number"),
        ({"num_epochs": 0}, ValueError, "`num_epochs` must be an integer of at least 1"),
        ({"num_epochs": 2.0}, ValueError, "`num_epochs` must be an integer of at least 1"),
        ({"num_samples": True}, ValueError, "`num_samples` must be an integer"),
        ({"dtype": "float64"}, ValueError, "`dtype` must be one of 'auto', 'float32'"),
        ({"head_sizes": "512"}, TypeError, "`head_sizes` must be a list of integers"),
        ({"head_sizes": [0]}, ValueError, r"`head_sizes\[...\]` must be an integer of at least 1"),
        ({"stop_strings": [5]}, TypeError, "`stop_strings` must be a list of texts"),
        ({"stop_strings": ["", "a"]}, ValueError, "not empty"),
        ({"training_arguments": [1]}, TypeError, "`training_arguments` must be a dict"),
        ({"split": None}, TypeError, "`split` must be a text"),
        ({"temprature": 1.0}, TypeError, "no setting 'temprature' here; did you mean 'temperature'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        FitSettings.of(None, changes)
    with pytest.raises(ValueError, match=r"x\.yaml: "):
        FitSettings.from_dict(changes, "x.yaml")


def test_settings_and_single_ones_go_together():
    settings = FitSettings.of(FitSettings(num_samples=3), {"head_sizes": [8, 8], "stop_strings": "a"})
    assert (settings.num_samples, settings.head_sizes, settings.stop_strings) == (3, (8, 8), ("a",))
    assert FitSettings.from_dict(settings.to_dict(), "x") == settings
    assert FitSettings.from_dict(yaml.safe_load("learning_rate: 3e-5\npatience: null\n"), "x").learning_rate == 3e-5
    with pytest.raises(TypeError, match="`settings` must be SamplingSettings, got ValueSettings"):
        SamplingSettings.of(ValueSettings(), {})
    with pytest.raises(AttributeError):
        settings.num_samples = 2


def test_v_and_g_share_what_they_must_agree_on():
    shared = names(ValueSettings) & names(AdvantageSettings)
    assert {"validation_split", "seed", "discount", "open_truncated"} <= shared


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    (folder / "fit.yaml").write_text(
        "model: base\nprompts: prompts.jsonl\nreward: my_reward:variety\nnum_samples: 2\nmax_new_tokens: 6\n"
        'temperature: 1.5\nhead_sizes: [16]\nadvantage_sizes: [8]\nnum_epochs: 3\nstop_strings: ["w9"]\n'
    )
    return folder


def run(*arguments, folder: Path, code: int = 0) -> str:
    found, out, err = run_fresh(RECONTROL, arguments, os.environ, timeout=300, cwd=folder)
    assert found == code, out + err
    assert "Traceback" not in err
    return out + err


def test_a_run_is_repeated_from_the_file_it_wrote_and_options_override_it(inputs, tmp_path):
    run("fit", "--config", "fit.yaml", "-o", tmp_path / "one", "--num-epochs", 2, folder=inputs)
    written = load_run(tmp_path / "one" / "fit.yaml")
    assert (written["num_epochs"], written["num_samples"], written["stop_strings"]) == (2, 2, ["w9"])
    assert written["reward"] == ["my_reward:variety"] and written["output"] == str(tmp_path / "one")
    assert set(written) == names(FitSettings) - {"token"} | {"model", "prompts", "reward", "output"}
    run("fit", "--config", tmp_path / "one" / "fit.yaml", "-o", tmp_path / "two", folder=inputs)
    one, two = (ValueHead.from_pretrained(tmp_path / name / "head") for name in ("one", "two"))
    assert one.config.control == two.config.control
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor)
    said = run("fit", "--config", tmp_path / "one" / "fit.yaml", "--seed", 1, folder=inputs, code=1)
    assert "seed was 0, is 1" in said
    assert load_run(tmp_path / "one" / "fit.yaml") == written, "a refused run changes nothing"


def test_what_is_missing_or_unknown_in_a_file_is_named_before_any_work(inputs, tmp_path):
    said = run("fit", "--config", "fit.yaml", folder=inputs, code=2)
    assert "missing; give --output here" in " ".join(said.split())
    for text, message in (
        ("temprature: 1.0", "there is no setting 'temprature'; did you mean 'temperature'?"),
        ("num_epochs: many", "`num_epochs` must be an integer"),
        ("- a\n- b", "must hold settings"),
        ("a: [", "is no YAML file"),
        ("model: 3", "`model` must be a text"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert message in run("fit", "--config", tmp_path / "bad.yaml", "-o", tmp_path / "run", folder=inputs, code=1)
    assert not (tmp_path / "run").exists()
    assert "absent.yaml" in run("fit", "--config", "absent.yaml", "-o", tmp_path / "run", folder=inputs, code=1)


@pytest.mark.parametrize(
    "text", ["7e12345", "1e-4", "08", "0o7", "1:30", ".5", "+.inf", "yes", "~", "2001-01-01", "<<"]
)
def test_what_a_file_of_settings_holds_is_read_as_it_was(tmp_path, text):
    values = {"revision": text, "chat_template_kwargs": {text: [text, 1.5, 1e-7, None, True]}, "count": 10}
    (tmp_path / "written.yaml").write_text(yaml_text(values))
    assert read_yaml(tmp_path / "written.yaml") == values


def test_merge_keys_are_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("shared: &s {a: 1, b: 2}\none: {<<: *s, b: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["one"] == {"a": 1, "b": 3}
    (tmp_path / "a.yaml").write_text("c: &c {x: 0}\na: {deep: &b {<<: *c, x: 1}}\nz: {<<: *b}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"c": {"x": 0}, "a": {"deep": {"x": 1}}, "z": {"x": 1}}
    (tmp_path / "a.yaml").write_text("c: &c {x: 0}\na: {<<: *c, y: 1, y: 2}\n")
    with pytest.raises(ValueError, match="'y' stands in it twice"):
        read_yaml(tmp_path / "a.yaml")


def test_what_was_left_open_is_open_again_where_other_settings_change():
    given = TuneSettings(budget=8000)
    assert given.kl == (0.1,)
    assert TuneSettings.of(given, {"criterion": {"reward": 1}}).kl == TuneSettings(criterion={"reward": 1}).kl
    assert TuneSettings.of(given, {"criterion": {"reward": 1}, "step_sizes": (1.0, 3.0)}).kl == ()
    assert TuneSettings.of(TuneSettings(kl=(0.3,)), {"budget": 9}).kl == (0.3,)
    quick = CompareSettings(quick=True)
    assert quick.limit is not None and CompareSettings.of(quick, {"quick": False}).limit is None
    assert CompareSettings.of(quick, {"limit": 5}).limit == 5 and CompareSettings.of(quick, {"seed": 1}) != quick


def test_a_stage_takes_its_settings_from_the_same_file(tmp_path):
    found = {}

    @with_settings(SamplingSettings)
    def command(settings: SamplingSettings) -> None:
        found["settings"] = settings

    for text in ("num_samples: 4\nnum_epochs: 3\nmodel: base\n", "num_samples: 4\nseed: 7\n"):
        (tmp_path / "stage.yaml").write_text(text)
        values = dict.fromkeys(names(SamplingSettings)) | {"seed": 9, "stop_strings": []}
        command(config=tmp_path / "stage.yaml", **values)
        assert (found["settings"].num_samples, found["settings"].seed) == (4, 9)


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def test_what_python_gave_without_a_name_is_left_out_and_said(tmp_path, recontrol_warnings):
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=6, temperature=1.5)
    prompts = [f"w{i}" for i in range(5, 31)]
    options = {"tokenizer": tiny_tokenizer(), "head_sizes": [8], "advantage_sizes": None, "num_epochs": 2}
    fit(model, prompts, length, tmp_path, generation_config=config, quiet=True, **options)
    text = (tmp_path / "fit.yaml").read_text()
    assert "`prompts` was given in Python and has no name" in text
    assert "loaded model (float32)" in text and "A tokenizer was given" in text and "same Python call" in text
    written = load_run(tmp_path / "fit.yaml")
    assert written["reward"] == [f"{__name__}:length"] and written["dtype"] == "float32"
    assert GenerationConfig.from_pretrained(written["generation_config"]).max_new_tokens == 6
    assert written["advantage_sizes"] is None and written["head_sizes"] == [8]
    # The static vector and the token bias need them too.
    assert written["directions"] is True


def test_a_generation_config_is_not_overridden_by_defaults(tmp_path):
    """What the command does not say is the generation config's to say."""
    from hf_recontrol.collection.sampling import sampling_config

    GenerationConfig(do_sample=True, temperature=0.5, top_k=0, max_new_tokens=7).save_pretrained(tmp_path)
    model = tiny_model("llama")
    config = sampling_config(model, tiny_tokenizer(), SamplingSettings(generation_config=str(tmp_path)))
    assert (config.temperature, config.max_new_tokens) == (0.5, 7)
    config = sampling_config(model, tiny_tokenizer(), SamplingSettings())
    assert (config.max_new_tokens, config.do_sample, config.top_k) == (128, True, 0)


def test_saying_none_on_the_command_line():
    found = {}

    @with_settings(TrainSettings)
    def command(settings: TrainSettings) -> None:
        found["settings"] = settings

    values = dict.fromkeys(names(TrainSettings))
    command(**values | {"patience": "none", "advantage_sizes": "none", "head_sizes": "8,8", "advantage_patience": "3"})
    settings = found["settings"]
    assert (settings.patience, settings.advantage_sizes, settings.head_sizes) == (None, None, (8, 8))
    assert settings.advantage_patience == 3
