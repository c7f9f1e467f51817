"""The page on which a person judges, and what a comparison makes of the verdicts that it saves."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from hf_recontrol import Rollout, compare, write_judge_page
from hf_recontrol.evaluation.judges.person import PersonJudge, digest_of

from .compared import in_copy, make_inputs, settings
from .fresh import RECONTROL, run_fresh
from .test_processes import ALONE

NASTY = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> & \"w8\" 'w9' </article>"
CONTROLS = [
    "base",
    {"kind": "best_of_n", "n": 2},
    {"kind": "advantage", "strengths": [0.312345678, 0.6]},
    {"name": "nasty", "kind": "mine:Says", "what": NASTY},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        compare(**settings(controls=CONTROLS), quiet=True)
        sys.modules.pop("mine", None)
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    yield from in_copy(finished, tmp_path, monkeypatch)


def again(verdicts, **changes):
    judge = {"kind": "person", "verdicts": verdicts}
    return compare(**settings(**{"controls": CONTROLS, "judge": judge} | changes), quiet=True)


class Page(HTMLParser):
    """`pairs`: of each pair's name its texts: request, left, right. `tags`: of all elements."""

    def __init__(self, path):
        super().__init__()
        self.pairs, self.tags, self._inside = {}, [], False
        self.source = Path(path).read_text(encoding="utf-8")
        self.page = re.search(r'data-page="(\w+)"', self.source)[1]
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "article":
            self._name = attributes["id"]
            self.pairs[self._name] = []
        if attributes.get("class") == "text":
            self.pairs[self._name].append("")
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.pairs[self._name][-1] += data


def by_length(page):
    """Who judges by length."""
    return {
        name: "left" if len(left) > len(right) else "right" if len(right) > len(left) else "tie"
        for name, (_, left, right) in page.pairs.items()
    }


def save(page, verdicts, path="saved.json"):
    Path(path).write_text(json.dumps({"kind": "hf_recontrol verdicts", "page": page.page, "verdicts": verdicts}))
    return path


def lines_of(control, strength=None):
    lines = parquet.read_table("out/answers.parquet").to_pylist()
    return {
        x["prompt_number"]: x
        for x in lines
        if x["control"] == control and x["strength"] == strength and x["sample"] == 0
    }


def test_verdicts_go_from_the_page_to_the_table(place):
    count = write_judge_page("out", "advantage", "judge.html", strength=0.6)
    page = Page("judge.html")
    own, base = lines_of("advantage", 0.6), lines_of("base")
    differ = [number for number in own if own[number]["completion"] != base[number]["completion"]]
    assert count == len(page.pairs) == len(differ) > 3
    found = {frozenset(texts[1:]) for texts in page.pairs.values()}
    assert found == {frozenset((own[n]["completion"], base[n]["completion"])) for n in differ}
    again(save(page, by_length(page)))
    for number, line in lines_of("advantage", 0.6).items():
        mine, other = len(line["completion"]), len(base[number]["completion"])
        assert line["win_rate"] == (mine > other) + 0.5 * (mine == other)
    for control, strength in (("advantage", 0.312345678), ("nasty", None), ("best_of_n", None), ("base", None)):
        assert all(line["win_rate"] is None for line in lines_of(control, strength).values())
    counts = json.loads(Path("out/figures.json").read_text())["judged"]
    assert (counts["answers"], counts["not_judged"]) == (count, 0)
    assert counts["identical"] == len(own) - count
    assert "Judge: a person, of advantage 0.6 alone" in Path("out/table.md").read_text()


def test_the_page_tells_nothing_of_who_wrote_which(place):
    write_judge_page("out", "advantage", "judge.html", strength=0.6)
    page = Page("judge.html")
    for told in ("advantage", "base", "0.6", "strength", "control", "out"):
        words = re.sub(r"<(style|script)>.*?</\1>", "", page.source, flags=re.DOTALL).replace("hf_recontrol", "")
        assert not re.search(rf"\b{re.escape(told)}\b", words), told
    key = json.loads(Path(f"out/judge-key-{page.page}.json").read_text())
    sides = [key["pairs"][name]["side"] for name in page.pairs]
    assert {"left", "right"} == set(sides)
    own = lines_of("advantage", 0.6)
    for name, (_, left, right) in page.pairs.items():
        pair = key["pairs"][name]
        assert {"left": left, "right": right}[pair["side"]] == own[pair["prompt_number"]]["completion"]
    numbers = [key["pairs"][name]["prompt_number"] for name in page.pairs]
    assert numbers != sorted(numbers)
    # The same call makes the same page, another seed another.
    before = page.source
    write_judge_page("out", "advantage", "judge.html", strength=0.6)
    assert Path("judge.html").read_text() == before
    write_judge_page("out", "advantage", "judge.html", strength=0.6, seed=1)
    other = Page("judge.html")
    assert (other.page != page.page, list(other.pairs.values()) != list(page.pairs.values())) == (True, True)


def test_texts_are_shown_and_never_run(place):
    write_judge_page("out", "nasty", "judge.html")
    page = Page("judge.html")
    assert all(NASTY in texts for texts in page.pairs.values())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.tags.count("article") == len(page.pairs) == 12
    # A browser runs the script by its hash alone.
    (script,) = re.findall(r"<script>(.*)</script>", page.source, flags=re.DOTALL)
    checksum = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{checksum}'" in page.source


def test_some_prompts_and_some_verdicts(place):
    count = write_judge_page("out", "advantage", "judge.html", strength=0.6, num_prompts=6)
    page = Page("judge.html")
    key = json.loads(Path(f"out/judge-key-{page.page}.json").read_text())
    assert (len(page.pairs), len(key["pairs"])) == (count, 6)
    said = dict(list(by_length(page).items())[:2])
    again(save(page, said))
    counts = json.loads(Path("out/figures.json").read_text())["judged"]
    met = list(key["pairs"])[: list(key["pairs"]).index("pair2") + 1]
    assert (counts["answers"], counts["not_judged"], counts["identical"]) == (2, count - 2, len(met) - 2)
    judged = [line for line in lines_of("advantage", 0.6).values() if line["win_rate"] is not None]
    assert {line["prompt_number"] for line in judged} == {key["pairs"][name]["prompt_number"] for name in met}


def test_verdicts_on_prompts_that_left_the_comparison_are_told(place):
    write_judge_page("out", "nasty", "judge.html")
    page = Page("judge.html")
    key = json.loads(Path(f"out/judge-key-{page.page}.json").read_text())["pairs"]
    gone = [name for name in page.pairs if key[name]["prompt_number"] >= 9]
    said = {name: side for name, side in by_length(page).items() if name not in (gone[0], "pair1", "pair2")}
    prompts = Path("prompts.jsonl")
    prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:9]))
    again(save(page, said))
    counts = json.loads(Path("out/figures.json").read_text())["judged"]
    left = set(page.pairs) - set(gone)
    assert (counts["answers"], counts["not_judged"]) == (len(left & set(said)), len(left - set(said)))
    assert counts["not_compared"] == len(set(gone) & set(said)) > 0
    told = f"{counts['not_compared']} more were judged, to prompts that are not among those compared on"
    assert told in Path("out/table.md").read_text()


def test_who_stops_early_adds_no_ties(tmp_path):
    digest = digest_of("p", "own", "other")
    pairs = {f"pair{i}": {"side": "left", "prompt_number": 2 * i, "digest": digest} for i in range(50)}
    pairs |= {f"same{i}": {"side": None, "prompt_number": 2 * i + 1, "digest": digest} for i in range(50)}
    own, others = ([Rollout("p", x, [1], [2], True, prompt_number=i) for i in range(100)] for x in ("own", "other"))
    names = random.Random(0).sample(sorted(pairs), 100)
    key = {"control": "c", "strength": None, "against": "base", "pairs": {name: pairs[name] for name in names}}
    (tmp_path / "judge-key-0123456789ab.json").write_text(json.dumps(key))
    for count in (10, 50):
        said = dict.fromkeys([name for name in names if name.startswith("pair")][:count], "left")
        (tmp_path / "saved.json").write_text(json.dumps({"page": "0123456789ab", "verdicts": said}))
        judge = PersonJudge([str(tmp_path / "saved.json")])
        judge.read(tmp_path, "base")
        judge.scores("c", None, own, others)
        counts = judge.counts()
        assert (counts["answers"], counts["not_judged"]) == (count, 50 - count)
        assert counts["identical"] == pytest.approx(count, abs=4)  # half of all prompts tie


def test_verdicts_on_answers_of_before_are_refused_beside_others(place):
    write_judge_page("out", "nasty", "judge.html")
    before = Page("judge.html")
    compare(**settings(controls=CONTROLS, seed=1), quiet=True)
    write_judge_page("out", "nasty", "judge.html")
    now = Page("judge.html")
    files = [save(before, by_length(before), "before.json"), save(now, by_length(now), "now.json")]
    for some in (files, files[::-1]):
        with pytest.raises(ValueError, match="is of other answers of 'nasty'"):
            again(some, seed=1)
    with pytest.raises(ValueError, match="names a file twice"):
        again(["now.json", "./now.json"], seed=1)


def test_of_several_persons_the_mean_counts(place):
    write_judge_page("out", "nasty", "judge.html")
    page = Page("judge.html")
    key = json.loads(Path(f"out/judge-key-{page.page}.json").read_text())["pairs"]
    sides = {name: key[name]["side"] for name in page.pairs}
    files = [save(page, sides, "one.json"), save(page, dict.fromkeys(sides, "tie"), "two.json")]
    again(files)
    assert {line["win_rate"] for line in lines_of("nasty").values()} == {0.75}
    assert {line["ties"] for line in lines_of("nasty").values()} == {0.5}


def test_what_no_page_of_this_comparison_has_saved_is_refused_before_any_work(place):
    write_judge_page("out", "nasty", "judge.html")
    page = Page("judge.html")
    good = save(page, by_length(page))
    before = Path("out/answers.parquet").read_bytes()
    wrong = {
        "not json": "no file of verdicts",
        "[]": "no file of verdicts",
        '{"page": "../../etc", "verdicts": {"pair1": "left"}}': "no file of verdicts",
        json.dumps({"page": page.page, "verdicts": {}}): "holds no verdict",
        json.dumps({"page": page.page, "verdicts": {"pair1": "both"}}): "no file of verdicts",
        json.dumps({"page": page.page, "verdicts": {"pair99": "left"}}): "not on the page",
        json.dumps({"page": "0" * 12, "verdicts": {"pair1": "left"}}): "not of the comparison",
    }
    for text, said in wrong.items():
        Path("wrong.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            again("wrong.json")
    for name, said in [("missing.json", "No such file"), ("out", "Is a directory")]:
        with pytest.raises(OSError, match=rf"`judge\.verdicts` names {name}, which cannot be read \({said}"):
            again(name)
    with pytest.raises(ValueError, match=re.escape("`judge.verdicts`")):
        again([])
    with pytest.raises(ValueError, match="no setting model"):
        compare(**settings(judge={"kind": "person", "verdicts": good, "model": "m"}), quiet=True)
    with pytest.raises(ValueError, match="against 'nasty'"):
        again(good, against="nasty")
    assert Path("out/answers.parquet").read_bytes() == before
    with pytest.raises(ValueError, match="no longer those that were judged"):
        again(good, seed=1)
    drawn = set(Path("out/answers").iterdir())
    with pytest.raises(ValueError, match="'nasty' was judged, and is not compared"):
        again(good, controls=CONTROLS[:3], max_new_tokens=3)
    assert set(Path("out/answers").iterdir()) == drawn


def test_what_cannot_be_judged_is_refused(place):
    for arguments, said in [
        (("out", "nothing"), "`control` must be one of 'advantage', 'nasty', which are compared with 'base'"),
        (("out", "base"), "`control` must be one of 'advantage', 'nasty', which"),
        (("out", "best_of_n"), "A best of n has several answers"),
        (("out", "advantage"), "0.312346, 0.6. Name one"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            write_judge_page(*arguments, "judge.html")
    with pytest.raises(ValueError, match=re.escape("0.312346, 0.6")):
        write_judge_page("out", "advantage", "judge.html", strength=5)
    assert write_judge_page("out", "advantage", "other.html", strength=0.312346) > 0  # as a table shows it
    with pytest.raises(ValueError, match=r"nasty.*: none"):
        write_judge_page("out", "nasty", "judge.html", strength=0.6)
    with pytest.raises(ValueError, match="`num_prompts`"):
        write_judge_page("out", "nasty", "judge.html", num_prompts=0)
    with pytest.raises(OSError, match="no finished comparison"):
        write_judge_page("base", "nasty", "judge.html")
    compare(**settings(controls=CONTROLS[:2]), quiet=True)
    with pytest.raises(ValueError, match="compares no control with 'base' that a person can judge"):
        write_judge_page("out", "base", "judge.html")
    again_same = [*CONTROLS[:1], {"name": "twin", "kind": "mine:Drawn"}]
    compare(**settings(controls=again_same), quiet=True)
    with pytest.raises(ValueError, match="nothing to judge"):
        write_judge_page("out", "twin", "judge.html")
    assert not Path("judge.html").exists()


def test_the_command(place):
    arguments = [
        "judge-page",
        "out",
        "--control",
        "advantage",
        "--strength",
        "0.6",
        "--num-prompts",
        "8",
        "-o",
        "p.html",
    ]
    code, out, err = run_fresh(RECONTROL, arguments, os.environ | ALONE, timeout=100, cwd=place)
    assert code == 0, err
    assert f"p.html holds {len(Page('p.html').pairs)} pairs" in out
    code, _, err = run_fresh(RECONTROL, [*arguments[:4]], os.environ | ALONE, timeout=100, cwd=place)
    assert (code, "Name one of them" in err) == (1, True)


# What a browser offers, as far as the page's script uses it.
_BROWSER = """
const fs = require("fs");
const [file, kept, presses] = [process.argv[2], process.argv[3], JSON.parse(process.argv[4])];
const source = fs.readFileSync(file, "utf8");
const made = (more) => ({hidden: false, dataset: {}, on: {}, attributes: {}, textContent: "",
  addEventListener(name, f) { this.on[name] = f; }, setAttribute(name, value) { this.attributes[name] = value; },
  click() { if (this.on.click) this.on.click(); else saved.push(this.download); }, ...more});
const articles = [...source.matchAll(/<article id="(\\w+)"/g)].map((m) => made({id: m[1], hidden: true}));
const buttons = [...source.matchAll(/data-choice="(\\w+)"/g)].map((m) => made({dataset: {choice: m[1]}}));
const byId = {}, saved = [], blobs = [], store = JSON.parse(kept);
for (const m of source.matchAll(/id="(\\w+)"/g)) byId[m[1]] = byId[m[1]] || made({});
const keys = {};
globalThis.document = {
  body: {dataset: {page: source.match(/data-page="(\\w+)"/)[1]}},
  querySelectorAll: (what) => what === "article" ? articles : buttons,
  getElementById: (id) => byId[id], createElement: () => made({}),
  addEventListener: (name, f) => { keys[name] = f; },
};
globalThis.localStorage = {getItem: (k) => store[k] === undefined ? null : store[k],
  setItem: (k, v) => { store[k] = v; }};
globalThis.Blob = class { constructor(parts) { blobs.push(parts.join("")); } };
URL.createObjectURL = () => "blob:1";
new Function(source.match(/<script>([\\s\\S]*)<\\/script>/)[1])();
for (const press of presses) {
  if (press.startsWith("#")) byId[press.slice(1)].click();
  else if (press.startsWith("=")) buttons.find((b) => b.dataset.choice === press.slice(1)).click();
  else keys.keydown({key: press.replace("~", ""), repeat: press.endsWith("~"), preventDefault() {}});
}
byId.save.click();
console.log(JSON.stringify({
  exported: JSON.parse(blobs[0]), name: saved[0], store, said: byId.said.textContent, tool: byId.tool.hidden,
  shown: articles.filter((a) => !a.hidden).map((a) => a.id),
  pressed: buttons.filter((b) => b.attributes["aria-pressed"] === "true").map((b) => b.dataset.choice),
}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script needs something that runs it")
def test_the_script_judges_by_keys_and_buttons_keeps_its_progress_and_saves(place):
    count = write_judge_page("out", "nasty", "judge.html")
    page = Page("judge.html")
    Path("browser.js").write_text(_BROWSER)

    def browse(kept, *presses):
        words = ["node", "browser.js", "judge.html", json.dumps(kept), json.dumps(presses)]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    names = list(page.pairs)
    assert names == [f"pair{i + 1}" for i in range(count)]
    found = browse({}, "1", "1~", "1~", "=right", "0", "x", "ArrowLeft")  # 1 is held down
    assert found["exported"]["verdicts"] == {"pair1": "left", "pair2": "right", "pair3": "tie"}
    assert found["exported"]["page"] == page.page
    assert found["name"] == f"verdicts-{page.page}.json"
    assert (found["shown"], found["pressed"], found["tool"]) == (["pair3"], ["tie"], False)
    assert found["said"] == f"Pair 3 of {count}. 3 judged."
    # Opened again it goes on behind what was judged; what another page has kept under this name does no harm.
    later = browse(found["store"])
    assert (later["shown"], later["exported"]) == (["pair4"], found["exported"])
    later = browse(found["store"], "#back", "2")
    assert later["exported"]["verdicts"] == {"pair1": "left", "pair2": "right", "pair3": "right"}
    assert later["shown"] == ["pair4"]
    odd = {f"recontrol-judge-{page.page}": json.dumps({"pair1": "both", "pair99": "left", "pair2": "tie"})}
    assert browse(odd)["exported"]["verdicts"] == {"pair2": "tie"}
    assert browse({f"recontrol-judge-{page.page}": "{broken"})["exported"]["verdicts"] == {}
    Path("saved.json").write_text(json.dumps(later["exported"]))
    again("saved.json")
    assert json.loads(Path("out/figures.json").read_text())["judged"]["answers"] == 3
