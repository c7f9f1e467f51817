"""The HTML report: one well-formed page that holds what the data hold, and nothing to run or load."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from hf_recontrol.evaluation.pages.report import write_report

EVIL = "<script>alert('x')</script><b onclick=\"y\">&amp;"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(HTMLParser):
    """Checks that tags are nested, and collects texts, attributes and ids."""

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(page)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "style" not in self.stack:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def full_data() -> dict:
    return {
        "title": "A head",
        "facts": {"Base model": "tiny", "Reward": "vader"},
        "figures": {
            "held_out_episodes": 2048,
            "held_out_prompts": 12,
            "value_error": 0.6412,
            "value_error_last": 0.3,
            "correlation_first": 0.2,
            "correlation_last": 0.8,
            "by_position": [{"position": i / 4, "error": 1 - i / 8, "correlation": i / 5} for i in range(5)],
            "calibration": [{"predicted": x, "realised": x * 0.9, "count": 5} for x in (-1.0, 0.0, 1.0)],
            "baselines": {"constant": 1.0, "prompt_mean": 0.9},
            "advantage_correlation": 0.11,
            "constant_correlation": 0.1,
            "reward_mean": 0.5,
            "warnings": ["Few prompts."],
        },
        "curves": {
            "value": [
                {"loss": 0.5, "epoch": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0},
                {"eval_value_error": 0.9, "epoch": 1.0, "eval_runtime": 3.0},
                {"loss": 0.4, "epoch": 2.0},
                {"eval_value_error": 0.8, "epoch": 2.0},
                {"train_runtime": 9.0, "train_loss": 0.45, "epoch": 2.0},
            ],
            "advantage": [{"loss": 0.1, "epoch": 1.0}, {"eval_advantage_error": 0.99, "epoch": 1.0}],
        },
        "examples": [
            {
                "prompt": [{"role": "user", "content": "Hello?"}],
                "completion": "Good bad",
                "reward": 0.5,
                "predicted": 0.25,
                "finished": True,
                "tokens": ["Good", " bad", " so"],
                "values": [1.5, 0.25, 0.5],
            },
            {
                "prompt": "Go on",
                "completion": "and on",
                "reward": [1.0, 2.0],
                "predicted": [0.5, 3],
                "finished": False,
            },
        ],
    }


EMPTY = {"title": "Nothing", "facts": {}, "figures": {}, "curves": {}, "examples": []}


@pytest.fixture
def render(tmp_path):
    def write(**changes) -> tuple[str, _Page]:
        write_report(tmp_path / "report.html", **(full_data() | changes))
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        return page, _Page(page)

    return write


def plots(page: str) -> list[str]:
    return re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)


def labels(page: str) -> list[str]:
    return [ElementTree.fromstring(svg).get("aria-label") for svg in plots(page)]


def rows(page: str) -> dict[str, str]:
    return dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td>', page))


def test_order(render):
    page, _ = render()
    wanted = ["<h1>A head", "Few prompts.", "Base model", "Learning V", "Learning g", "Along the response"]
    wanted += ["Predicted and realised", ">Figures<", ">Examples<", "Hello?"]
    places = [page.index(text) for text in wanted]
    assert places == sorted(places)
    assert page.count("How to read this") == 5


def test_well_formed_with_unique_ids(render):
    page, parsed = render()
    assert page.startswith("<!DOCTYPE html>")
    ids = parsed.all("id")
    assert len(ids) == len(set(ids)) > 0
    used = {value[1:] for value in parsed.all("xlink:href")} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used and used <= set(ids), "a plot refers to a part that is not there"


def test_plots_are_xml_with_a_title(render):
    page, _ = render()
    assert len(plots(page)) == 4
    for svg in plots(page):
        root = ElementTree.fromstring(svg)
        title = root.find("{http://www.w3.org/2000/svg}title")
        assert root.get("role") == "img" and root.get("aria-label") == title.text != ""


def test_self_contained(render):
    page, parsed = render()
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
        if not name.startswith("xmlns"):
            assert "http://" not in (value or "") and "https://" not in (value or "")
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))
    assert "prefers-color-scheme:dark" in page


def test_texts_are_escaped(render):
    _, harmless = render()
    data = full_data()
    chat = [{"role": EVIL, "content": EVIL}]
    example = {"prompt": chat, "completion": EVIL, "reward": 1.0, "predicted": 1.0, "finished": True}
    data["examples"] += [example, example | {"prompt": EVIL, "tokens": [EVIL, "</div>"], "values": [0.0, 1.0]}]
    page, parsed = render(
        title=EVIL,
        facts={EVIL: EVIL},
        figures=data["figures"] | {"warnings": [EVIL]},
        examples=data["examples"],
    )
    assert set(parsed.tags) == set(harmless.tags)
    assert "onclick" not in dict(parsed.attributes)
    assert "<script" not in page
    # The two titles, label and text, the warning, role, two prompts, the completion, the token.
    assert parsed.text.count(EVIL) == 10


def test_texts_that_utf8_cannot_hold(render):
    page, _ = render(facts={"a": "\udce4 ü 木"})
    assert "? ü 木" in page


def test_missing_figures(render):
    page, _ = render(
        figures={
            "value_error": None,
            "correlation_last": math.nan,
            "baselines": {"constant": 1.0, "prompt_mean": None},
        }
    )
    assert rows(page) == {
        "V's error along the response": "-",
        "V's correlation with the reward, last token": "-",
        "Error of the training mean reward": "1",
        "Error of the prompt's mean reward": "-",
    }
    assert labels(page) == ["Learning curves of V by epoch", "Learning curves of g by epoch"]
    assert '<section class="warnings">' not in page


def test_figures(render):
    page, _ = render()
    found = rows(page)
    assert found["Held-out responses"] == "2,048"
    assert found["V's error along the response"] == "0.641"
    assert len(found) == 10


def test_empty(tmp_path):
    write_report(tmp_path / "new" / "folder" / "report.html", **EMPTY)
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert _Page(page).text.split() == ["Nothing", "Nothing"]
    assert plots(page) == []


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ({"curves": {"value": [{"epoch": 1, "loss": 0.5}]}}, "Learning curves of V"),
        ({"curves": {"value": [{"epoch": 1, "eval_value_error": 0.5}]}}, "Learning curves of V"),
        ({"curves": {"advantage": [{"epoch": 1, "eval_advantage_error": 0.5}]}}, "Learning curves of g"),
        ({"figures": {"by_position": [{"position": 0.0, "error": 0.5}]}}, "by position"),
        ({"figures": {"by_position": [{"position": 0.0, "error": None, "correlation": -0.5}]}}, "by position"),
        ({"figures": {"calibration": [{"predicted": 0.0, "realised": 0.0, "count": 1}]}}, "Realised reward"),
    ],
)
def test_one_plot(render, data, label):
    page, _ = render(**(EMPTY | data))
    (found,) = labels(page)
    assert label in found
    assert page.count("How to read this") == 1


@pytest.mark.parametrize(
    "data",
    [
        {"curves": {"value": [{"epoch": 2.0, "train_loss": 0.5}, {"epoch": 1.0, "eval_loss": 0.4}, {"loss": 0.1}]}},
        {"curves": {"value": [{"epoch": 1.0, "loss": math.nan}, {"epoch": 1.0, "eval_advantage_error": 0.4}]}},
        {"curves": {"value": [], "advantage": None}},
        {"figures": {"by_position": [{"position": 0.5, "error": None, "correlation": math.nan}]}},
        {"figures": {"calibration": [{"predicted": None, "realised": None, "count": 0}]}},
        {"figures": {"by_position": [], "calibration": None}},
    ],
)
def test_no_plot(render, data):
    page, _ = render(**(EMPTY | data))
    assert labels(page) == []


def test_baselines_are_drawn(render):
    def dashes(baselines: dict) -> int:
        by_position = [{"position": i / 2, "error": 0.5} for i in range(3)]
        page, _ = render(**(EMPTY | {"figures": {"by_position": by_position, "baselines": baselines}}))
        return page.count("stroke-dasharray")

    # Each line is drawn in the plot and in its legend.
    assert dashes({"constant": 1.0, "prompt_mean": 0.9}) == dashes({"constant": 1.0, "prompt_mean": None}) + 2
    assert dashes({}) == 0


def test_token_colours(render):
    page, parsed = render()
    tokens = re.findall(r'<span title="(.*?)" style="background:rgba\((\d+),\d+,(\d+),([\d.]+)\)">(.*?)</span>', page)
    (good, *_), (_, bad_red, bad_blue, bad_opacity, _), (neutral, *_, neutral_opacity, _) = tokens
    assert [token[-1] for token in tokens] == ["Good", " bad", " so"]
    assert (good, neutral) == ("1.5", "0.5")
    assert int(tokens[0][1]) > int(tokens[0][2]) and int(bad_red) < int(bad_blue)
    # Symmetric around the mean reward: 0.25 below it is a quarter of 1.0 above it.
    assert float(bad_opacity) == pytest.approx(float(tokens[0][3]) / 4, abs=0.01)
    assert float(neutral_opacity) == 0
    assert "-0.5" in parsed.text and "1.5" in parsed.text, "the scale's ends"


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.5], [math.nan, math.nan, math.nan]])
def test_values_without_a_range(render, values):
    example = full_data()["examples"][0] | {"values": values}
    page, parsed = render(examples=[example])
    assert 'class="scale"' not in page and "nan" not in re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert "Good bad so" in parsed.text


def test_examples(render):
    _, parsed = render()
    assert "reward 0.5" in parsed.text and "predicted 0.25" in parsed.text
    assert "reward 1, 2" in parsed.text and "predicted 0.5, 3" in parsed.text
    assert parsed.text.count("cut off at the length limit") == 1
    assert "and on" in parsed.text


def test_messages_that_hold_more_than_a_text(render):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": "warm?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
        {"role": "tool", "content": "21"},
    ]
    _, parsed = render(examples=[{"prompt": chat, "completion": "Yes.", "reward": 1.0, "predicted": 0.5}])
    assert "Is it\nwarm?" in parsed.text and '{"tool_calls": [{"name": "weather"}]}' in parsed.text
    assert "21" in parsed.texts and "None" not in parsed.texts


def test_tokens_and_values_must_match(render):
    example = full_data()["examples"][0] | {"values": [1.0]}
    with pytest.raises(ValueError, match=r"`examples\[1\]` has 3 tokens and 1 values"):
        render(examples=[full_data()["examples"][1], example])


def test_same_data_same_page(render):
    assert render()[0] == render()[0]


def test_failed_write_keeps_the_old_page(render, tmp_path, monkeypatch):
    old, _ = render()

    def half(self, text, **kwargs):
        with open(self, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "report.html", **(full_data() | {"title": "New"}))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_recontrol\[train\]'"):
        write_report(tmp_path / "report.html", **EMPTY)
    assert list(tmp_path.iterdir()) == []


def test_no_pyplot(tmp_path):
    code = """
import sys
from hf_recontrol.evaluation.pages.report import write_report
assert "matplotlib" not in sys.modules  # which most users of the package never need
from tests.test_report import full_data
write_report(sys.argv[1], **full_data())
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.html")], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
