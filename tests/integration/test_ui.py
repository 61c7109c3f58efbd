"""MLflow's UI as a person meets it: `overfill ui` on a finished sweep, in headless Chromium.

Screenshots stay in `$OVERFILL_SCREENSHOTS`, where that is set. Skipped where Debian's `chromium` and `chromium-driver`
(or others that `PATH` has) or `selenium` are missing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import SyntheticStore, outcomes, toy_cells

from pipeline.experiment import Experiment, keep_experiment
from pipeline.tracking.tracker import Tracker

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.common.exceptions import WebDriverException  # noqa: E402 - only where it is installed

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip(
        "no chromium with its chromedriver here (apt-get install chromium chromium-driver)", allow_module_level=True
    )

QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--window-size=1700,1300",
)
PATIENCE_S = 60.0
PLOTS = """return [...document.querySelectorAll('.js-plotly-plot')].map(plot =>
    ({type: plot.data[0].type, points: plot.data.map(trace => (trace.x || []).length)}))"""

CLICK = """const found = [...document.querySelectorAll(arguments[0])].find(e => e.innerText.includes(arguments[1]));
    if (found) found.click();
    return Boolean(found)"""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[SyntheticStore, list]:
    """A finished sweep that MLflow knows."""
    synthetic = SyntheticStore(tmp_path_factory.mktemp("ui") / "runs")
    cells = toy_cells(ratios=(0.5, 0.75), methods=("full", "overfill", "pruned"))
    for number, cell in enumerate(cells):
        synthetic.finish(cell, outcomes(190 - 10 * number))
    keep_experiment(Experiment(cells[0].config, cells), synthetic.store)
    with Tracker(synthetic.store, cells[0].config, cells, uri=f"sqlite:///{synthetic.store.root}/mlflow.db"):
        pass
    return synthetic, cells


@pytest.fixture(scope="module")
def address(sweep: tuple[SyntheticStore, list]) -> Iterator[str]:
    """The sweep's own address in a server that `overfill ui` has started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline.cli", "ui", "--store", str(sweep[0].store.root), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    place = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment | place) as server:
        assert server.stderr is not None
        try:
            words = (line.split() for line in server.stderr)
            yield next(line[1] for line in words if line and line[0] == "toy:")
        finally:
            server.send_signal(signal.SIGTERM)
            server.stderr.read()  # or a full pipe would keep it from ending
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server outlived its command"


@pytest.fixture(autouse=True)
def last_sight(request: pytest.FixtureRequest, browser: Any) -> Iterator[None]:
    """What the browser showed at the end of a test."""
    yield
    keep(browser, f"last-{request.node.name}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield chrome
    chrome.quit()


def visit(browser: Any, address: str) -> None:
    """Open a page anew, for one that only gets another query keeps what it shows; a starting server gets time."""
    browser.get("about:blank")
    eventually(lambda: browser.get(address) or True, trouble=WebDriverException)


def eventually(look: Callable[[], Any], trouble: type[Exception] = AssertionError) -> Any:
    """What `look` returns once it is true."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            found = look()
        except trouble:
            if time.monotonic() > deadline:
                raise
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, "the page never showed it"
        time.sleep(0.5)


def text(browser: Any) -> str:
    return browser.find_element("tag name", "body").text


def keep(browser: Any, name: str) -> None:
    if folder := os.environ.get("OVERFILL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder, f"{name}.png")))


def click(browser: Any, selector: str, label: str = "") -> None:
    """Click the first element of this selector and text, once it is there; in one step, for React replaces elements."""
    eventually(lambda: browser.execute_script(CLICK, selector, label))


def select_all(browser: Any) -> bool:
    """Tick the table's header, which does nothing before the rows are there; whether the cells can be compared now."""
    click(browser, ".ag-header input[type=checkbox]")
    for _ in range(10):
        time.sleep(0.5)
        if browser.execute_script(
            "return [...document.querySelectorAll('button')].some(b => b.innerText.trim() === 'Compare')"
        ):
            return True
    return False


def test_the_sweeps_own_view_shows_its_cells_and_what_matters_of_them(browser, address, sweep) -> None:
    visit(browser, address.replace("&compareRunsMode=CHART", ""))
    cells = [cell.label for cell in sweep[1]]
    eventually(lambda: all(label in text(browser) for label in cells))
    keep(browser, "cells")
    shown = text(browser)
    assert "5 matching runs" in shown, "the sweep's own run is no cell"
    for column in ("method", "ratio", "eval/exact_match", "latency/tpot_ms"):
        assert column[:12] in shown


def test_a_filter_by_tag_leaves_the_cells_of_one_method(browser, address) -> None:
    filtered = "searchFilter=tags.sweep+%3D+%27toy%27+and+tags.method+%3D+%27overfill%27"
    filtered += "&orderByKey=metrics.%60eval%2Fexact_match%60&orderByAsc=false"  # by a metric, or parents are shown too
    visit(browser, f"{address.split('?')[0]}?{filtered}")
    keep(browser, "filter")
    eventually(lambda: "2 matching runs" in text(browser))
    assert "pruned" not in text(browser)


def test_charts_show_accuracy_and_latency_of_every_cell(browser, address, sweep) -> None:
    visit(browser, address)
    plots = eventually(lambda: [p for p in browser.execute_script(PLOTS) if p["type"] == "scatter"])
    keep(browser, "charts")
    assert sum(plots[0]["points"]) == len(sweep[1])
    bars = [plot for plot in browser.execute_script(PLOTS) if plot["type"] == "bar"]
    assert [sum(bar["points"]) for bar in bars[:2]] == [len(sweep[1])] * 2
    axes = eventually(lambda: browser.find_elements("css selector", ".parcoords .axis, .parcoords .dimension"))
    assert {"method", "ratio"} <= {word for axis in axes for word in axis.text.split()}


def test_selected_cells_are_compared_in_parallel_coordinates_and_scatter(browser, address, sweep) -> None:
    visit(browser, address.replace("&compareRunsMode=CHART", ""))
    eventually(lambda: "5 matching runs" in text(browser))
    eventually(lambda: select_all(browser))
    click(browser, "button", "Compare")
    parallel = eventually(lambda: [p for p in browser.execute_script(PLOTS) if p["type"] == "parcoords"])
    assert parallel
    keep(browser, "compare")
    assert all(cell.label in text(browser) for cell in sweep[1])
    (tab,) = [tab for tab in browser.find_elements("css selector", "[role=tab]") if "Scatter" in tab.text]
    tab.click()  # with the mouse: tabs do not hear of a click that a script makes
    eventually(lambda: [p for p in browser.execute_script(PLOTS) if p["type"].startswith("scatter")])
    keep(browser, "compare-scatter")


def test_a_cell_shows_its_results_curves_and_samples(browser, address, sweep) -> None:
    visit(browser, address.replace("&compareRunsMode=CHART", ""))
    label = sweep[1][1].label
    eventually(lambda: label in text(browser))
    click(browser, "a", label)
    eventually(lambda: "time per output token" in text(browser))
    keep(browser, "cell")
    run = browser.current_url.split("?")[0].rstrip("/")
    visit(browser, f"{run}/model-metrics")
    search = "[placeholder='Search metric charts']"
    (box,) = eventually(lambda: browser.find_elements("css selector", search))
    box.send_keys("loss")
    eventually(lambda: any(10 in plot["points"] for plot in browser.execute_script(PLOTS)))
    keep(browser, "curves")
    visit(browser, f"{run}/artifacts/samples.json")
    eventually(lambda: all(word in text(browser) for word in ("reference", "prediction", "2+2")))
    keep(browser, "samples")
