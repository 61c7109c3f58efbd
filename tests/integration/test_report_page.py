"""The report's page in a real browser: its script runs under its own policy, and finds everything that it asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, outcomes, toy_cells

from pipeline.reporting.html_report import write_page
from pipeline.reporting.report import make_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.integration


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_the_script_runs_and_the_calculator_answers(tmp_path: Path) -> None:
    synthetic = SyntheticStore(tmp_path / "runs")
    cells = toy_cells(ratios=(0.25, 0.5, 0.6, 0.75), methods=("full", "overfill", "pruned"))
    for cell in cells:
        right = {"full": 150, "overfill": 150 - round(40 * cell.ratio), "pruned": 150 - round(130 * cell.ratio)}
        synthetic.finish(cell, outcomes(right[cell.method]))
    write_page(make_report("toy", "", cells, synthetic.store), cells, synthetic.store, tmp_path / "page.html")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert '<html lang="en" class="script">' in done.stdout
    result = re.search(r'id="g-result"[^>]*>([^<]*)<', done.stdout)
    assert result is not None
    assert re.match(r"quality \d+\.\d ± \d+\.\d %", result[1])
    assert "<title>small" not in done.stdout  # tips have taken the place of the marks' titles
