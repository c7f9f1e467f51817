"""Files from anybody: whatever they hold, the answer is a head or an error that says why, without delay."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_recontrol import ValueHead
from hf_recontrol.configuration import TrainingRecord
from hf_recontrol.data.rollouts import rollout_parts
from hf_recontrol.data.stage_folder import MANIFEST_NAME, read_manifest
from hf_recontrol.data.states import StateStore
from hf_recontrol.evaluation.judges.person import read_saved
from hf_recontrol.heads.card import is_untouched, write_card
from hf_recontrol.heads.hub import find_file

from .conftest import STRONG, make_head

pytestmark = pytest.mark.usefixtures("recontrol_warnings")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("head")
    head = make_head(
        hook_point="lm_head",
        advantage_sizes=[4],
        base_model_name_or_path="org/base",
        control=STRONG,
        training=TrainingRecord(rewards=["r"], figures={"value_error": 0.5}),
    )
    head.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(tmp_path_factory, files: dict[str, bytes]) -> None:
    """Load what the files hold: a head that can be used, or an error of the kinds that are promised."""
    folder = tmp_path_factory.mktemp("untrusted")
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            head = ValueHead.from_pretrained(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
        else:
            assert torch.isfinite(head(torch.zeros(head.config.hidden_size))).all()
            head.save_pretrained(folder)
    finally:
        shutil.rmtree(folder)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A few bytes changed, cut out or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 6)))
        content = content[:start] + draw(st.binary(max_size=6)) + content[end:]
    return content


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 10**400, 1e308, float("inf"), float("nan"), "", "..", "/etc", "nul\0"])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_config(files, tmp_path_factory, data):
    read(tmp_path_factory, files | {"config.json": data.draw(damaged(files["config.json"]))})


@given(data=st.data())
@settings(max_examples=250)
def test_a_config_with_another_value(files, tmp_path_factory, data):
    config = json.loads(files["config.json"])
    place = data.draw(st.sampled_from([config, config["control"], config["training"]]))
    place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=5))] = data.draw(json_values)
    read(tmp_path_factory, files | {"config.json": json.dumps(config).encode()})


@given(data=st.data())
@settings(max_examples=150)
def test_damaged_weights(files, tmp_path_factory, data):
    read(tmp_path_factory, files | {"model.safetensors": data.draw(damaged(files["model.safetensors"]))})


@given(data=st.data())
@settings(max_examples=150)
def test_weights_with_another_header(files, tmp_path_factory, data):
    content = files["model.safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    tensor = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    tensor[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(
        json_values | st.lists(st.integers(0, 2**62), max_size=3) | st.sampled_from(["F64", "I8", "BOOL", "F8_E4M3"])
    )
    try:
        text = json.dumps(header).encode()
    except RecursionError:
        return
    size = data.draw(st.sampled_from([len(text), 0, 2**40, 2**63, len(text) + 1]))
    body = struct.pack("<Q", size) + text + content[8 + length :]
    read(tmp_path_factory, files | {"model.safetensors": body})


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 100_000, b"\xff\xfe{}", b""])
def test_a_config_made_to_break_the_parser(files, tmp_path_factory, content):
    read(tmp_path_factory, files | {"config.json": content})


@given(content=st.binary(max_size=200))
def test_any_card_is_left_alone(files, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_bytes(content)
    write_card(folder, "new")
    assert (folder / "README.md").read_bytes() == content
    shutil.rmtree(folder)


@given(data=st.data())
def test_a_card_that_was_changed_anywhere_is_somebodys(files, data):
    card = data.draw(damaged(files["README.md"])).decode("utf-8", errors="replace")
    assert is_untouched(files["README.md"].decode())
    assert is_untouched(card) == (card == files["README.md"].decode())


@pytest.mark.parametrize("name", ["../part-00000.parquet", "/etc/passwd", "part-00000.parquet/../../x", ""])
@pytest.mark.parametrize("reader", [rollout_parts, StateStore.open], ids=["rollouts", "states"])
def test_a_manifest_cannot_point_out_of_its_folder(tmp_path, reader, name):
    kind = "rollouts" if reader is rollout_parts else "states"
    (tmp_path / "part-00000.parquet").write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    manifest = {"format_version": 1, "kind": kind, "complete": True, "settings": {}, "parts": {name: "0"}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="names the part"):
        reader(folder)


@given(value=json_values)
def test_a_manifest_of_anything(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("manifest")
    (folder / MANIFEST_NAME).write_text(json.dumps(value))
    with pytest.raises((ValueError, OSError), match="manifest"):
        read_manifest(folder, "rollouts", "recontrol rollout")
    shutil.rmtree(folder)


@given(value=json_values | st.fixed_dictionaries({"page": json_values, "verdicts": json_values}))
def test_verdicts_of_anything(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("verdicts") / "saved.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"saved\.json"):
        read_saved(path)
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc"])
def test_a_subfolder_cannot_lead_out_of_the_folder(tmp_path, subfolder):
    with pytest.raises(OSError, match="subfolder"):
        find_file(tmp_path, "config.json", subfolder=subfolder)
    with pytest.raises(OSError, match="subfolder"):
        find_file("org/head", "config.json", subfolder=subfolder)


def test_links_lead_out_of_no_folder(files, tmp_path):
    for folder in ("elsewhere", "weights", "config", "sub"):
        (tmp_path / folder).mkdir()
        for name, content in files.items():
            (tmp_path / folder / name).write_bytes(content)
    for folder, name in (("weights", "model.safetensors"), ("config", "config.json")):
        (tmp_path / folder / name).unlink()
        (tmp_path / folder / name).symlink_to(tmp_path / "elsewhere" / name)
        with pytest.raises(OSError, match=rf"{name} is a link to .*elsewhere.*, outside .*{folder}"):
            ValueHead.from_pretrained(tmp_path / folder)
    (tmp_path / "sub" / "head").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(OSError, match="is a link to"):
        ValueHead.from_pretrained(tmp_path / "sub", subfolder="head")
    # A link within the folder, and one to the folder, are the user's.
    (tmp_path / "sub" / "config.json").rename(tmp_path / "sub" / "real.json")
    (tmp_path / "sub" / "config.json").symlink_to("real.json")
    (tmp_path / "named").symlink_to(tmp_path / "sub", target_is_directory=True)
    ValueHead.from_pretrained(tmp_path / "named")


def test_saving_writes_through_no_link(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(b'{"hidden_size": 7}')
        (tmp_path / "folder" / name).symlink_to(tmp_path / name)
    (tmp_path / "folder" / "README.md").unlink()
    (tmp_path / "folder" / "README.md").symlink_to(tmp_path / "absent")
    make_head().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "absent").exists()
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / name).read_bytes() == b'{"hidden_size": 7}'
    ValueHead.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**12}, "shape"),
        ({"hidden_size": 2**63}, "no tensors can have the sizes"),
        ({"hidden_size": 10**400}, "config.json"),
        ({"num_objectives": 10**12}, "shape"),
        ({"head_sizes": [10**9, 10**9]}, "missing tensors"),
        ({"head_sizes": [1] * 100_000}, "`head_sizes` must hold at most 100"),
        ({"advantage_sizes": [1] * 100_000}, "`advantage_sizes` must hold at most 100"),
        ({"head_sizes": [1] * 1_000_000}, "bytes are more than"),
        ({"control": {"num_steps": 10**12}}, "`num_steps` must be at most 10000"),
        ({"base_model_revision": "../../../etc/hostname"}, "`base_model_revision`"),
        ({"base_model_revision": "/etc/hostname"}, "`base_model_revision`"),
        ({"base_model_revision": "..\\up"}, "`base_model_revision`"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_at_once(files, tmp_path, values, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(files["config.json"]) | values))
    resource = pytest.importorskip("resource")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, start = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), before[1]))
    try:
        with pytest.raises(ValueError, match=message):
            ValueHead.from_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < 5


def test_a_header_that_claims_more_than_the_file_holds_takes_no_memory(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    width = 10**10
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": width, "head_sizes": []}))
    tensors, start = {}, 0
    shapes = {"state_mean": [width], "state_scale": [width], "value_mlp.layers.0.weight": [1, width]}
    for name, shape in (shapes | {"value_mlp.layers.0.bias": [1]}).items():
        end = start + 4 * shape[-1]
        tensors[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    header = json.dumps(tensors).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        ValueHead.from_pretrained(tmp_path)
