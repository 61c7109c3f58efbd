"""The page is whole, holds what was measured, needs no network, and lets no text of a model become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic_store import ANSWERS, SyntheticStore, outcomes, toy_cells

from overfill.errors import UserError
from pipeline.reporting.html_report import page, write_page
from pipeline.reporting.report import make_report
from pipeline.sweep import Cell

RIGHT = {"full": 150, "overfill": 145, "pruned": 90}
VOID = frozenset({"meta", "input", "br", "img", "link"})


@pytest.fixture
def synthetic(tmp_path: Path) -> SyntheticStore:
    return SyntheticStore(tmp_path / "runs")


def finished(synthetic: SyntheticStore, **given) -> list[Cell]:
    cells = toy_cells(methods=("full", "overfill", "pruned"), **given)
    for cell in cells:
        stage = cell.stage("distill")
        if stage is not None and synthetic.store.record(stage) is None:
            synthetic.log(stage, range(1, 11), **{"validation/nll": 1.0})
        synthetic.finish(cell, outcomes(RIGHT[cell.method]))
    return cells


def page_of(cells: list[Cell], synthetic: SyntheticStore, description: str = "a hypothesis") -> str:
    return page(make_report("toy", description, cells, synthetic.store), cells, synthetic.store)


class Balanced(HTMLParser):
    """Fails on a tag that is closed without being open; collects attributes and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_the_page_answers_before_anything_else_and_every_tag_is_closed(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic), synthetic)
    parsed(text)
    body = text[text.index("<body>") :]
    for answer in (
        "ship OverFill at ratio 0.5",
        "TPOT 1.00 ms, 4.00x",
        "not surely 95%",
        "averaged over tasks: +61.1 %",
    ):
        assert body.index(answer) < body.index('id="charts"')


def test_charts_are_well_formed_and_have_a_mark_per_configuration_with_its_numbers(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic, ratios=(0.25, 0.5)), synthetic)
    charts = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.S)]
    named = {chart.get("aria-label"): chart for chart in charts}
    assert set(named) == {
        *("exact match over TPOT", "exact match over memory", "small"),
        *("held-out response NLL", "training loss"),
    }
    marks = [node for node in named["exact match over memory"].iter() if (node.get("class") or "").startswith("mark")]
    tips = [mark[0].text or "" for mark in marks]  # the first child is the title
    assert len(marks) == 5
    assert sum("small: OverFill at ratio 0.5\nexact match 72.5 ± 6.1 %" in tip for tip in tips) == 1
    faded = [tip for mark, tip in zip(marks, tips, strict=True) if "faded" in (mark.get("class") or "")]
    assert [tip.splitlines()[0] for tip in faded] == ["small: OverFill at ratio 0.25", "small: OverFill at ratio 0.5"]
    assert all(tip.endswith("dominated by small: full model") for tip in faded)
    curves = [node for node in named["training loss"].iter() if "curve" in (node.get("class") or "")]
    assert len(curves) == 4


def test_nothing_is_loaded_and_no_script_but_ours_may_run(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic), synthetic)
    for tag, name, value in parsed(text).attributes:
        assert name not in ("src", "srcset", "action") and not name.startswith("on"), (tag, name, value)
        assert name != "href" or (value or "").startswith("#")
    assert "url(" not in text and "@import" not in text
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</pre></td>{{ 7*7 }}"]
)
def test_text_of_models_and_files_stays_text(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch, hostile: str
) -> None:
    monkeypatch.setitem(ANSWERS, False, hostile)
    teacher = {"name": "small", "pretrain": {"hidden": 64, "intermediate": 128, "layers": 2}}
    text = page_of(finished(synthetic, teacher=teacher), synthetic, description=hostile)
    assert hostile not in text
    parser = parsed(text)
    assert parser.texts.count(hostile) >= 2  # the description and the samples
    assert not any(name.startswith("on") for _, name, _ in parser.attributes)


def test_samples_stand_side_by_side_with_every_outcome_and_its_count(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic), synthetic)
    assert "right: OverFill, pruned only 90 · right: OverFill 55 · right: none of the students 55" in text
    samples = text[text.index('id="samples"') : text.index('id="provenance"')]
    assert (
        samples.count('<tr data-agree="no">') == 13
    )  # 8 of one outcome in three, and 5 that the full model alone has right
    for head in ("prompt", "reference", "full model", "OverFill", "pruned only"):
        assert f'<th class="left">{head}</th>' in samples


def test_provenance_names_every_artifact_with_the_digest_of_its_record(synthetic: SyntheticStore) -> None:
    cells = finished(synthetic)
    text = page_of(cells, synthetic)
    for stage in {stage.identity: stage for cell in cells for stage in cell.stages}.values():
        record = synthetic.store.payload(stage) / "record.json"
        assert stage.identity in text
        assert hashlib.sha256(record.read_bytes()).hexdigest() in text


def test_only_fields_that_differ_are_listed(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic), synthetic)
    part = text[text.index('id="differences"') : text.index('id="samples"')]
    assert "distill.method" in part
    assert "distill.learning_rate" not in part


def test_the_guideline_travels_as_data_for_the_calculator(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic, ratios=(0.25, 0.5, 0.6, 0.75)), synthetic)
    data = re.search(r'<script type="application/json" id="guidelines">(.*?)</script>', text, re.S)
    assert data is not None
    found = {one["name"]: one for one in json.loads(data[1])}
    assert set(found) == {"OverFill", "pruned only"}
    assert found["OverFill"]["kept"][0] < found["OverFill"]["kept"][1]


def test_a_sweep_with_nothing_done_has_a_page_that_says_so(synthetic: SyntheticStore) -> None:
    cells = toy_cells()
    text = page_of(cells, synthetic)
    parsed(text)
    assert "Nothing can be recommended yet" in text
    assert "0 of 2 cells done" in text


def test_the_same_store_gives_the_same_page(synthetic: SyntheticStore) -> None:
    cells = finished(synthetic)
    assert page_of(cells, synthetic) == page_of(cells, synthetic)


def test_a_page_that_cannot_be_written_is_a_line_with_the_way_out(synthetic: SyntheticStore, tmp_path: Path) -> None:
    cells = toy_cells()
    report = make_report("toy", "", cells, synthetic.store)
    with pytest.raises(UserError, match=r"--html .*nowhere/page.html: cannot be written .*give another file"):
        write_page(report, cells, synthetic.store, tmp_path / "nowhere" / "page.html")


def test_a_page_needs_neither_torch_nor_ray_nor_pandas_nor_matplotlib(
    synthetic: SyntheticStore, tmp_path: Path
) -> None:
    finished(synthetic)
    code = """
import sys
from pathlib import Path
from synthetic_store import Store, toy_cells
from pipeline.reporting.html_report import page
from pipeline.reporting.report import make_report
cells, store = toy_cells(methods=("full", "overfill", "pruned")), Store(Path(sys.argv[1]))
assert "ship OverFill" in page(make_report("t", "", cells, store), cells, store)
print(*({"torch", "ray", "pandas", "matplotlib", "mlflow", "scipy", "transformers"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(synthetic.store.root)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[3])])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert done.stdout.strip() == ""


def test_samples_of_tasks_stand_side_by_side_too(synthetic: SyntheticStore) -> None:
    text = page_of(finished(synthetic, evaluate={"tasks": ["toy_add", "toy_get", "toy_sort"]}), synthetic)
    parsed(text)
    titles = re.findall(r"<summary>(.*?)</summary>", text)
    assert titles[:3] == ["small, ratio 0.5", "small, ratio 0.5: toy_add", "small, ratio 0.5: toy_get"]
    assert "<pre>toy_add?</pre>" in text
    assert "average over 2 tasks over TPOT" in text


def test_every_method_that_a_sweep_can_name_is_drawn_and_can_be_switched_off(synthetic: SyntheticStore) -> None:
    methods = ("full", "overfill", "assisted", "pruned", "lora", "untrained", "untrained-overfill", "scratch")
    cells = toy_cells(methods=methods)
    for place, cell in enumerate(cells):
        synthetic.finish(cell, outcomes(150 - 5 * place))
    text = page_of(cells, synthetic)
    parsed(text)
    for method in methods:
        assert f'data-hide="method" data-value="{method}"' in text
        assert f'class="mark m-{method}' in text
