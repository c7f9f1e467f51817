"""
Coverage-guided fuzzing (atheris) of everything that reads a file which may be anybody's. `make fuzz` runs each target
for a while, or one alone: `python tests/fuzz_untrusted.py config -max_total_time=60`. A target ends badly at an error
of another kind than those promised, at a crash, after 10 seconds, and where it takes a gigabyte.
"""

import json
import logging
import random
import resource
import shutil
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["hf_recontrol"]):
    from hf_recontrol import ControlConfig, ValueHead, ValueHeadConfig
    from hf_recontrol.configuration import TrainingRecord
    from hf_recontrol.custom_generate import generate as custom
    from hf_recontrol.data.stage_folder import MANIFEST_NAME, read_manifest
    from hf_recontrol.evaluation.judges.person import read_saved
    from hf_recontrol.evaluation.trace.critics import load_critic
    from hf_recontrol.heads.card import is_untouched, model_card, write_card
    from hf_recontrol.heads.convert import convert_checkpoint
    from hf_recontrol.heads.seen_prompts import PROMPTS_NAME, SeenPrompts

import torch

from hub_server import metadata_errors  # isort: skip (found beside this file)

LIMITS = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]
GIGABYTE = 1 << 30
ODD = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**12,
    10**400,
    0.5,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "..",
    "/etc",
]
ODD += ["nul\0", "advantage", "a/b", "../a/b", "---\n", "# ```\n", [], [1] * 200, [0.5, 2.0], ["x"], {}, {"a": 1}]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time an odd value somewhere in what is JSON; else bytes as the fuzzer likes."""
    chance = random.Random(seed)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    places = [value] if isinstance(value, (dict, list)) and value and chance.random() < 0.5 else []
    for place in places:
        items = place.values() if isinstance(place, dict) else place
        places += [item for item in items if isinstance(item, (dict, list)) and item]
    if not places:
        return atheris.Mutate(data, max_size)
    place = chance.choice(places)
    key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = chance.choice(ODD)
    return json.dumps(value).encode()[:max_size]


def valid_files(folder: Path) -> dict[str, bytes]:
    """The files of a head, a checkpoint of the authors' form and a stage's manifest."""
    head = ValueHead(
        ValueHeadConfig(
            4,
            head_sizes=[3],
            hook_point="lm_head",
            advantage_sizes=[2],
            base_model_name_or_path="org/base",
            control=ControlConfig("advantage", 1.0),
            control_figures={
                "control": ControlConfig("advantage", 1.0).to_dict(),
                "criterion": "reward",
                "prompts": 3,
                "figures": {"reward": [0.5, 0.25, None]},
            },
            training=TrainingRecord(rewards=["r"], dataset="org/data", figures={"value_error": 0.5}, command="run"),
        )
    )
    head.seen_prompts = SeenPrompts(torch.tensor([1, 2]), torch.tensor([3]))
    head.save_pretrained(folder)
    torch.save({"fc1.weight": torch.ones(3, 4), "fc1.bias": torch.ones(3)}, folder / "value.pth")
    manifest = {"format_version": 1, "kind": "rollouts", "complete": True, "parts": {"part-00000.parquet": "0"}}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Targets:
    """
    Each target takes the bytes that replace a file, or a part of one, in a folder of valid files. It returns if what
    reads them makes something usable of them, or raises an error of a promised kind that names the file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = valid_files(folder)
        (length,) = struct.unpack("<Q", self.files["model.safetensors"][:8])
        self.body = self.files["model.safetensors"][8 + length :]
        with zipfile.ZipFile(folder / "value.pth") as archive:
            self.records = {name: archive.read(name) for name in archive.namelist()}
        (self.pickle,) = (name for name in self.records if name.endswith("data.pkl"))
        self.seeds = {
            "config": self.files["config.json"],
            "weights": self.files["model.safetensors"],
            "prompts": self.files[PROMPTS_NAME],
            "header": self.files["model.safetensors"][8 : 8 + length],
            "card": self.files["README.md"],
            "described": self.files["config.json"],
            "custom": self.files["config.json"],
            "checkpoint": self.files["value.pth"],
            "pickle": self.records[self.pickle],
            "manifest": self.files[MANIFEST_NAME],
            "critic": json.dumps(
                {"reads": {"every": 1, "critic_layer": 0, "prefix_every": 2, "prefix_means": [[0.5], [0.25]]}}
            ).encode(),
            "verdicts": json.dumps({"page": "0123456789ab", "verdicts": {"pair1": "left"}}).encode(),
        }

    def write(self, name: str, data: bytes) -> Path:
        (self.folder / name).write_bytes(data)
        return self.folder / name

    def head(self, name: str, data: bytes) -> None:
        path = self.write(name, data)
        try:
            head = ValueHead.from_pretrained(self.folder)
        except (ValueError, OSError) as error:
            assert str(self.folder) in str(error), error
        else:
            assert torch.isfinite(head(torch.zeros(head.config.hidden_size))).all()
            assert not metadata_errors(model_card(head.config, "me/head"))
        path.write_bytes(self.files[name])

    def config(self, data: bytes) -> None:
        self.head("config.json", data)

    def weights(self, data: bytes) -> None:
        self.head("model.safetensors", data)

    def prompts(self, data: bytes) -> None:
        self.head(PROMPTS_NAME, data)

    def header(self, data: bytes) -> None:
        self.head("model.safetensors", struct.pack("<Q", len(data)) + data + self.body)

    def card(self, data: bytes) -> None:
        path = self.write("README.md", data)
        write_card(self.folder, "new")
        assert path.read_bytes() == data or is_untouched(data.decode("utf-8", errors="replace"))

    def described(self, data: bytes) -> None:
        """The card of any configuration that loads."""
        try:
            config = ValueHeadConfig.from_json_file(self.write("any.json", data))
        except ValueError:
            return
        card = model_card(config, "me/head", config.base_model_name_or_path or "", revision=config.base_model_revision)
        assert is_untouched(card) and not metadata_errors(card), card

    def custom(self, data: bytes) -> None:
        """The file that every push carries, which reads its repo's configuration itself."""
        path = self.write("config.json", data)
        try:
            config, tensors = custom.load_head(str(self.folder), {})
            custom.check(config, tensors, custom.DEFAULTS | (config["control"] or {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        path.write_bytes(self.files["config.json"])

    def checkpoint(self, data: bytes) -> None:
        path = self.write("value.pth", data)
        try:
            head = convert_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error), error
        else:
            assert torch.isfinite(head(torch.zeros(head.config.hidden_size))).all()

    def pickle_of_checkpoint(self, data: bytes) -> None:
        with zipfile.ZipFile(self.folder / "made.pth", "w") as archive:
            for name, content in self.records.items():
                archive.writestr(name, data if name == self.pickle else content)
        self.checkpoint((self.folder / "made.pth").read_bytes())

    def manifest(self, data: bytes) -> None:
        self.write(MANIFEST_NAME, data)
        try:
            read_manifest(self.folder, "rollouts", "recontrol rollout")
        except (ValueError, OSError) as error:
            assert MANIFEST_NAME in str(error) or str(self.folder) in str(error), error

    def critic(self, data: bytes) -> None:
        self.write("training.json", data)
        try:
            critic = load_critic(self.folder, TrainingRecord(rewards=["r"], sampling={"do_sample": True}))
        except ValueError:
            return
        assert critic.prefix_means is None or (critic.prefix_every and torch.isfinite(critic.prefix_means).all())

    def verdicts(self, data: bytes) -> None:
        path = self.write("verdicts.json", data)
        try:
            page, said = read_saved(path)
        except (ValueError, OSError) as error:
            assert str(path) in str(error), error
        else:
            assert page.isalnum() and set(said.values()) <= {"left", "right", "tie"}


def main() -> None:
    logging.getLogger("hf_recontrol").setLevel(logging.ERROR)
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "files").mkdir()
        targets = Targets(folder / "files")
        corpus = folder / "corpus"
        corpus.mkdir()
        (corpus / "valid").write_bytes(targets.seeds[name])
        function = targets.pickle_of_checkpoint if name == "pickle" else getattr(targets, name)
        function(targets.seeds[name])
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTE, resource.RLIM_INFINITY))
        atheris.Setup([sys.argv[0], *LIMITS, *options, str(corpus)], function, custom_mutator=mutate)
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
