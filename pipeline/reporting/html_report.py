"""The report as one page that needs no network: answers first, then charts, tables, differences, samples, provenance.

The page is whole without its script; the script adds what needs a pointer: hiding methods, tips, a filter, a calculator.
Everything that comes from a model or a file is escaped by the template; as a second wall the page's own policy lets no
script run but ours, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.errors import UserError
from pipeline.record import write_text
from pipeline.reporting.charts import cost_chart, ratio_charts, training_charts
from pipeline.reporting.guideline import Guideline
from pipeline.reporting.methods import LOOKS, METHODS
from pipeline.reporting.pareto import COSTS
from pipeline.reporting.provenance import differing_fields, provenance
from pipeline.reporting.report import Report
from pipeline.reporting.side_by_side import sample_tables
from pipeline.reporting.svg import SHAPES
from pipeline.reporting.tables import LEFT, notes, tables
from pipeline.reporting.wording import duration, size, verdicts

if TYPE_CHECKING:
    from pipeline.store import Store
    from pipeline.sweep import Cell

PAGE = Path(__file__).parent / "page"
PAGE_FILE = "report.html"
"""The page in a sweep's own folder."""


def write_page(report: Report, cells: Sequence[Cell], store: Store, path: Path) -> None:
    """Write the page whole or not at all. Raises UserError where it cannot be written."""
    text = page(report, cells, store)
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}); give another file") from error


def page(report: Report, cells: Sequence[Cell], store: Store) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {"LEFT": LEFT, "SHAPES": SHAPES, "duration": duration, "size": size}
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        **_content(report, cells, store),
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _content(report: Report, cells: Sequence[Cell], store: Store) -> dict[str, Any]:
    shown = dict.fromkeys(group.method for group in report.groups)
    fields, values = differing_fields(cells)
    return {
        "report": report,
        "verdicts": verdicts(report),
        "methods": [(method, LOOKS[method]) for method in METHODS if method in shown],
        "teachers": list(dict.fromkeys(group.teacher for group in report.groups)),
        "cost_charts": [chart for cost in COSTS if (chart := cost_chart(report, cost)) is not None],
        "ratio_charts": ratio_charts(report),
        "training_charts": training_charts(cells, store),
        "tables": tables(report),
        "notes": notes(report),
        "guidelines": [_formulas(one) for one in report.guidelines if one.fits],
        "cells": cells,
        "fields": fields,
        "values": values,
        "samples": sample_tables(report.groups, cells, store),
        "provenance": provenance(cells, store),
        "done": sum(row["state"] == "done" for row in report.rows),
    }


def _formulas(one: Guideline) -> dict[str, Any]:
    """What the page's calculator needs of a guideline."""
    return {
        "name": LOOKS[one.method].name + (f" ({one.variant})" if one.variant else ""),
        "parameters": one.parameters,
        "kept": one.kept,
        "fits": {fit.target: {**fit.coefficients, "error": fit.error} for fit in one.fits if fit.is_useful},
    }
