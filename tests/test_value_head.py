"""ValueHead: shapes, units, files. Loading is strict, saving is atomic, and nothing is ever unpickled."""

import json
import os
import pickle
import re
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_recontrol.heads.value_head
from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig

from .conftest import make_head, make_llama

ACTIVATIONS = ["relu", "silu", "gelu", "tanh"]
REFERENCE = {
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "tanh": torch.tanh,
}


def tensors(head: ValueHead) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def assert_same_head(a: ValueHead, b: ValueHead) -> None:
    assert a.config == b.config
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        other = b.state_dict()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


@pytest.fixture
def saved(tmp_path):
    """The folder of a head with both parts."""
    folder = tmp_path / "head"
    make_head(hidden_size=6, head_sizes=[5], hook_point="lm_head", advantage_sizes=[4]).save_pretrained(folder)
    return folder


# Shapes and units


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("objectives", [1, 3])
def test_values_and_advantages_have_the_shape_of_the_states(shape, objectives):
    head = make_head(hidden_size=6, num_objectives=objectives, hook_point="lm_head", advantage_sizes=[4])
    states = torch.randn(*shape, 6)
    assert head(states).shape == (*shape, objectives)
    assert head.advantage(states).shape == (*shape, 6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [[], [5], [5, 7], [5, 7, 3]])
def test_both_parts_are_the_mlp_of_the_scaled_state(activation, sizes):
    head = make_head(
        dtype=torch.float64,
        hidden_size=6,
        head_sizes=sizes,
        activation=activation,
        num_objectives=2,
        hook_point="lm_head",
        advantage_sizes=sizes,
    )
    head.state_mean.normal_()
    head.state_scale.uniform_(0.5, 2)
    states = torch.randn(4, 6, dtype=torch.float64)
    for mlp, result in [(head.value_mlp, head(states)), (head.advantage_mlp, head.advantage(states))]:
        x = (states - head.state_mean) / head.state_scale
        for index, layer in enumerate(mlp.layers):
            x = x @ layer.weight.T + layer.bias
            if index < len(sizes):
                x = REFERENCE[activation](x)
        torch.testing.assert_close(result, x)


@pytest.mark.parametrize("width", [5, 7, 1])
def test_states_of_another_width_are_an_error_that_names_both(width):
    head = make_head(hidden_size=6, hook_point="lm_head", advantage_sizes=[])
    for function in (head, head.advantage):
        with pytest.raises(ValueError, match=rf"width 6.*\(2, {width}\)"):
            function(torch.zeros(2, width))


def test_advantage_without_an_advantage_part_is_an_error():
    with pytest.raises(ValueError, match="advantage_sizes"):
        make_head().advantage(torch.zeros(1, 16))


def test_an_untrained_advantage_part_is_zero_and_an_untrained_value_part_is_not():
    head = ValueHead(ValueHeadConfig(hidden_size=6, hook_point="lm_head", advantage_sizes=[4, 3]))
    states = torch.randn(5, 6)
    assert torch.equal(head.advantage(states), torch.zeros(5, 6))
    assert head(states).std() > 0


def test_a_head_reads_states_of_another_dtype():
    head = make_head(hidden_size=6)
    states = torch.randn(3, 6).bfloat16()
    torch.testing.assert_close(head(states), head(states.float()))
    assert head(states).dtype == torch.float32


@pytest.mark.parametrize(
    ("mean", "std", "expected"),
    [(0.0, 1.0, [[1.0, 2.0]]), (10.0, 2.0, [[12.0, 14.0]]), ([10.0, -1.0], [2.0, 0.5], [[12.0, 0.0]])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rewards_are_values_in_the_rewards_own_units(mean, std, expected, dtype):
    head = make_head(hidden_size=6, num_objectives=2, reward_mean=mean, reward_std=std)
    rewards = head.rewards(torch.tensor([[1.0, 2.0]], dtype=dtype))
    assert rewards.dtype == dtype
    assert rewards.tolist() == expected


# Round trips


@st.composite
def heads(draw):
    widths = st.lists(st.integers(1, 9), max_size=3)
    hook_point = draw(st.sampled_from(["decoder_layer", "lm_head"]))
    head = make_head(
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        hidden_size=draw(st.integers(1, 9)),
        head_sizes=draw(widths),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        num_objectives=draw(st.integers(1, 3)),
        hook_point=hook_point,
        layer=draw(st.integers(-3, 3)),
        advantage_sizes=draw(st.none() | widths) if hook_point == "lm_head" else None,
        reward_mean=draw(st.floats(-10, 10)),
        base_model_name_or_path=draw(st.sampled_from([None, "org/base", "a b/ü"])),
        control=draw(st.sampled_from([None, ControlConfig(step_size=(0.5, 0.25), num_steps=3)])),
    )
    head.state_mean.normal_()
    head.state_scale.uniform_(0.5, 2)
    return head


@settings(max_examples=25)
@given(heads())
def test_a_head_loads_bit_for_bit_as_it_was_saved(tmp_path_factory, head):
    folder = tmp_path_factory.mktemp("head")
    head.save_pretrained(folder)
    loaded = ValueHead.from_pretrained(folder)
    assert_same_head(loaded, head)
    states = torch.randn(3, head.config.hidden_size, dtype=torch.float64)
    assert torch.equal(loaded(states), head(states))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_saved_head_holds_three_readable_files_and_no_model_type(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "model_type" not in json.loads((saved / "config.json").read_text())
    umask = os.umask(0)
    os.umask(umask)
    for path in saved.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_a_head_is_found_in_a_subfolder(saved):
    assert_same_head(ValueHead.from_pretrained(saved.parent, subfolder="head"), ValueHead.from_pretrained(saved))


def test_a_loaded_head_can_be_trained_and_saved_again(saved):
    head = ValueHead.from_pretrained(saved)
    before = tensors(head)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    (head(torch.randn(4, 6)).square().mean() + head.advantage(torch.randn(4, 6)).square().mean()).backward()
    optimizer.step()
    head.save_pretrained(saved)
    assert not torch.equal(head.value_mlp.layers[0].weight, before["value_mlp.layers.0.weight"])
    assert_same_head(ValueHead.from_pretrained(saved), head)


def test_a_loaded_head_does_not_change_with_its_file(saved):
    head = ValueHead.from_pretrained(saved)
    before = tensors(head)
    make_head(seed=9, hidden_size=6, head_sizes=[5], hook_point="lm_head", advantage_sizes=[4]).save_pretrained(saved)
    (saved / "model.safetensors").write_bytes(b"")
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_tensors_of_mixed_dtypes_come_out_in_one(saved):
    path = saved / "model.safetensors"
    mixed = load_file(path)
    mixed["value_mlp.layers.0.weight"] = mixed["value_mlp.layers.0.weight"].bfloat16()
    mixed["advantage_mlp.layers.0.bias"] = mixed["advantage_mlp.layers.0.bias"].double()
    save_file(mixed, path)
    head = ValueHead.from_pretrained(saved)
    assert {tensor.dtype for tensor in head.state_dict().values()} == {torch.float32}
    assert torch.equal(head.value_mlp.layers[0].weight, mixed["value_mlp.layers.0.weight"].float())
    assert head(torch.randn(2, 6)).shape == (2, 1)


# Strict loading


def rewrite(folder, change) -> None:
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / "model.safetensors")


NAME = "value_mlp.layers.0.weight"
BAD_TENSORS = {
    "missing": (lambda x: x.pop(NAME), f"missing tensors .*{NAME}"),
    "missing buffer": (lambda x: x.pop("state_mean"), "missing tensors .*state_mean"),
    "extra": (lambda x: x.update(other=torch.zeros(1)), "extra tensors .*other"),
    "renamed": (lambda x: x.update(v=x.pop(NAME)), f"missing tensors .*{NAME}.*extra tensors .*'v'"),
    "transposed": (lambda x: x.update({NAME: x[NAME].T}), rf"`{NAME}` has shape \(6, 5\).*\(5, 6\)"),
    "other width": (lambda x: x.update({NAME: torch.zeros(5, 7)}), rf"`{NAME}` has shape \(5, 7\)"),
    "one dimension less": (lambda x: x.update({NAME: torch.zeros(30)}), rf"`{NAME}` has shape \(30,\)"),
    "NaN": (lambda x: x[NAME].__setitem__((0, 0), torch.nan), f"`{NAME}` .*NaN or infinite"),
    "infinity": (lambda x: x["state_mean"].__setitem__(0, torch.inf), "`state_mean`.*NaN or infinite"),
    "scale of zero": (lambda x: x["state_scale"].__setitem__(0, 0), "`state_scale`.*not above 0"),
    "negative scale": (lambda x: x["state_scale"].__setitem__(0, -1), "`state_scale`.*not above 0"),
    "integers": (lambda x: x.update({NAME: x[NAME].int()}), f"`{NAME}` has dtype I32"),
    "booleans": (lambda x: x.update({NAME: x[NAME] > 0}), f"`{NAME}` has dtype BOOL"),
    "eight bits": (lambda x: x.update({NAME: x[NAME].to(torch.float8_e4m3fn)}), f"`{NAME}` has dtype F8"),
    "nothing at all": (lambda x: x.clear(), "missing tensors .*state_mean"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_tensor_that_is_not_the_heads_is_an_error_that_names_file_and_tensor(saved, name):
    change, message = BAD_TENSORS[name]
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message) as error:
        ValueHead.from_pretrained(saved)
    assert str(saved / "model.safetensors") in str(error.value)


@pytest.mark.parametrize("keep", [0, 1, 8, 20, 0.5, -1])
def test_a_cut_off_file_is_an_error_that_names_it(saved, keep):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        ValueHead.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"x" * 1000, b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_of_another_kind_is_an_error_that_names_it(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        ValueHead.from_pretrained(saved)


def test_the_safetensors_of_another_model_is_an_error(saved):
    save_file({"model.embed_tokens.weight": torch.zeros(3, 2)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors.*state_mean.*model\.embed_tokens\.weight"):
        ValueHead.from_pretrained(saved)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("write", ["pickle", "torch", "torch legacy"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "head.pth", "value_head.pt"])
def test_a_pickle_is_refused_and_never_run(saved, tmp_path, write, name):
    mark = tmp_path / "mark"
    (saved / "model.safetensors").unlink()
    with open(saved / name, "wb") as file:
        if write == "pickle":
            pickle.dump(Trap(mark), file)
        else:
            torch.save({"state_mean": Trap(mark)}, file, _use_new_zipfile_serialization=write == "torch")
    expected = OSError if name != "model.safetensors" else ValueError
    with pytest.raises(expected, match="pickle" if name == "model.safetensors" else f"{name}.*unpickled.*safetensors"):
        ValueHead.from_pretrained(saved)
    assert not mark.exists()
    # The trap works: it would have been sprung.
    with open(saved / name, "rb") as file:
        if write == "pickle":
            pickle.load(file).close()
        else:
            torch.load(file, weights_only=False)["state_mean"].close()
    assert mark.exists()


def test_a_folder_without_weights_names_the_missing_file(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"No model\.safetensors in .*head"):
        ValueHead.from_pretrained(saved)


def test_a_folder_without_a_config_names_the_missing_file(tmp_path):
    with pytest.raises(OSError, match=r"No config\.json in "):
        ValueHead.from_pretrained(tmp_path)


def test_a_file_instead_of_a_folder_is_an_error_that_says_so(saved):
    with pytest.raises(OSError, match="is not a folder"):
        ValueHead.from_pretrained(saved / "model.safetensors")


@pytest.mark.parametrize("subfolder", ["nothing", "config.json"])
def test_a_subfolder_that_is_none_is_an_error_that_names_it(saved, subfolder):
    with pytest.raises(OSError, match=f"{subfolder} is not a folder"):
        ValueHead.from_pretrained(saved, subfolder=subfolder)


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "./nothing", "/nothing/here", "bad name!", ""])
def test_what_can_be_neither_folder_nor_repo_is_an_error_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=re.escape(repr(name)) if name else "config.json"):
        ValueHead.from_pretrained(name)


def test_what_might_be_a_repo_is_an_error_that_names_both_ways_out_when_offline(tmp_path):
    with pytest.raises(OSError, match=r"'nobody/nothing'.*no local folder.*Check the name"):
        ValueHead.from_pretrained("nobody/nothing", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[1]", "expected a JSON object"),
        ("{}", "no `hidden_size`"),
        ('{"head_sizes": [5]}', "no `hidden_size`"),
        ('{"hidden_size": 1e12}', "`hidden_size`"),
        ('{"hidden_size": -6}', "`hidden_size`"),
        ('{"hidden_size": "6"}', "`hidden_size`"),
        ('{"hidden_size": 6, "activation": "exec"}', "`activation`"),
        ('{"hidden_size": 6, "reward_mean": NaN}', "`reward_mean`"),
        ('{"hidden_size": 6, "control": {"step_size": -1}}', "`step_size`"),
        ('{"hidden_size": 6, "control": 3}', "`control`"),
        ('{"hidden_size": 6, "format_version": 99}', "`format_version`"),
    ],
)
def test_a_bad_config_file_is_an_error_that_names_file_and_field(saved, content, message):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        ValueHead.from_pretrained(saved)


@pytest.mark.parametrize(
    "absurd",
    [
        {"hidden_size": 10**12},
        {"hidden_size": 10**19},
        {"hidden_size": 10**400},
        {"head_sizes": [10**12]},
        {"hidden_size": 10**12, "head_sizes": [10**12]},
        {"advantage_sizes": [10**12, 10**12]},
        {"num_objectives": 10**15},
    ],
    ids=["tera", "beyond int64", "beyond float", "wide", "tera squared", "wide advantage", "objectives"],
)
def test_absurd_sizes_are_an_error_that_names_a_file_and_take_no_memory(saved, absurd):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | absurd))
    with pytest.raises(ValueError, match=r"config\.json|model\.safetensors"):
        ValueHead.from_pretrained(saved)


def test_unknown_config_keys_warn_and_the_head_loads(saved, recontrol_warnings):
    head = ValueHead.from_pretrained(saved)
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    assert_same_head(ValueHead.from_pretrained(saved), head)
    (message,) = recontrol_warnings
    assert "from_the_future" in message and "config.json" in message


# Saving


def fails(*args, **kwargs):
    raise KeyboardInterrupt


def fails_half_way(tensors, path, **kwargs):
    with open(path, "wb") as file:
        file.write(b"half of it")
    raise OSError("No space left on device")


@pytest.mark.parametrize("save", [fails, fails_half_way])
@pytest.mark.parametrize("head_sizes", [[5], [9]])
def test_weights_that_cannot_be_written_leave_the_old_head_as_it_was(saved, monkeypatch, save, head_sizes):
    old = ValueHead.from_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    new = make_head(seed=5, hidden_size=6, head_sizes=head_sizes, hook_point="lm_head", advantage_sizes=[4])
    monkeypatch.setattr(hf_recontrol.heads.value_head, "save_file", save)
    with pytest.raises((KeyboardInterrupt, OSError)):
        new.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert_same_head(ValueHead.from_pretrained(saved), old)


def test_a_config_that_cannot_be_written_leaves_the_old_head_as_it_was(saved, monkeypatch):
    # New weights beside the old config would be a head that cannot be loaded, or that means something else.
    old = ValueHead.from_pretrained(saved)
    new = make_head(seed=5, hidden_size=6, head_sizes=[9], reward_mean=3.0)
    monkeypatch.setattr(ValueHeadConfig, "to_json", fails)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(saved)
    monkeypatch.undo()
    assert len(list(saved.iterdir())) == 3
    assert_same_head(ValueHead.from_pretrained(saved), old)


def test_a_first_save_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_recontrol.heads.value_head, "save_file", fails_half_way)
    with pytest.raises(OSError, match="No space"):
        make_head().save_pretrained(tmp_path / "head")
    assert list((tmp_path / "head").iterdir()) == []


def test_a_head_with_nan_is_not_saved(tmp_path):
    head = make_head()
    with torch.no_grad():
        head.value_mlp.layers[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"`value_mlp\.layers\.0\.bias`"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_saving_over_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file is a file"):
        make_head().save_pretrained(tmp_path / "file")
    with pytest.raises(OSError):
        make_head().save_pretrained(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_makes_the_folders_above(tmp_path):
    make_head().save_pretrained(tmp_path / "a" / "b")
    assert ValueHead.from_pretrained(tmp_path / "a" / "b").config.hidden_size == 16


def test_a_head_saved_in_a_training_or_inference_state_is_the_same(tmp_path):
    with torch.inference_mode():
        head = make_head()
        head.save_pretrained(tmp_path)
    assert_same_head(ValueHead.from_pretrained(tmp_path), head)


def test_a_head_replaces_a_head_and_never_a_model(tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    other = tmp_path / "other"
    other.mkdir()
    for folder, config in (
        (tmp_path / "base", None),
        (other, '{"_class_name": "Pipeline"}'),
        (other, "[1"),
        (other, ""),
    ):
        if config is not None:
            (folder / "config.json").write_text(config)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(OSError, match=r"config\.json that is not a head's.*name another folder"):
            make_head().save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for seed in (1, 2):
        make_head(seed=seed).save_pretrained(tmp_path / "head")
    # Also where another release wrote it.
    config = tmp_path / "head" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 99}))
    make_head(seed=3).save_pretrained(tmp_path / "head")
    assert_same_head(ValueHead.from_pretrained(tmp_path / "head"), make_head(seed=3))
