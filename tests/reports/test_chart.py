"""The chart as text, Markdown, CSV, JSON and SVG: the numbers of the data, in any width, and nothing that runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from estimator.chart import Chart, make_chart
from estimator.published_chart import published_chart
from reports import chart as reports
from reports.chart_svg import chart_svg
from reports.screen import Screen

HOSTILE = '<script>x</script> | "a" \x1b[31m & `b`'


@pytest.fixture(scope="module")
def chart() -> Chart:
    return make_chart(
        {"model": ["nano", "llama-3.1-8b", "70e9"], "method": ["full", "lora"], "accelerator": ["RTX-3090"]}
    )


def drawn(chart: Chart, width: int) -> str:
    text = io.StringIO()
    reports.print_chart(Screen(text, width=width, colour=False), chart)
    return text.getvalue()


@pytest.mark.parametrize("width", [40, 60, 100])
def test_a_terminal_of_any_width_gets_every_value_within_it(chart: Chart, width: int) -> None:
    text = drawn(chart, width)
    assert max(len(line) for line in text.splitlines()) <= width
    for row in chart.rows:
        for cell in row.cells:
            assert reports.cell_text(cell) in text
    assert "*: fits RTX-3090." in text and text.isascii()


def test_an_asterisk_stands_where_the_accelerator_has_the_memory(chart: Chart) -> None:
    full, lora = chart.rows[0], chart.rows[-1]
    assert not reports.cell_text(full.cells[1]).endswith("*") and reports.cell_text(lora.cells[1]).endswith("*")


def test_two_models_of_one_size_are_told_apart_by_name() -> None:
    assert reports.column_heads(make_chart({"model": ["llama-2-7b", "nano"]})) == ["6.74B", "1.18M"]
    assert reports.column_heads(make_chart({"model": ["llama-3-8b", "llama-3.1-8b"]})) == ["llama-3-8b", "llama-3.1-8b"]


def test_csv_and_json_hold_base_units_and_the_whole_setup(chart: Chart) -> None:
    records = list(csv.DictReader(io.StringIO(reports.chart_csv(chart))))
    assert len(records) == len(chart.rows) * len(chart.columns)
    first = chart.rows[0].cells[0]
    assert float(records[0]["peak_device_bytes"]) == first.peak_device_bytes.value
    assert (records[0]["model"], records[0]["precision"], records[0]["fits"]) == ("nano", "bf16-mixed", "True")
    document = json.loads(json.dumps(reports.chart_document(chart)))
    assert document["schema"] == "vramcalc/chart/1"
    assert document["rows"][0]["cells"][0]["peak_device_bytes"]["value"] == first.peak_device_bytes.value
    assert document["columns"][1]["parameters"] == 8_030_261_248


def test_markdown_is_a_table_with_a_cell_for_each_value(chart: Chart) -> None:
    lines = [line for line in reports.chart_markdown(chart).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(chart.rows)
    assert {line.count("|") for line in lines} == {2 + len(chart.columns)}


def test_the_figure_is_one_file_with_a_line_a_method_and_a_dot_a_model(chart: Chart) -> None:
    root = ElementTree.fromstring(chart_svg(chart))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{space}polyline")) == len(chart.rows)
    assert len(root.findall(f".//{space}circle")) == len(chart.rows) * len(chart.columns)
    texts = [element.text for element in root.iter(f"{space}text")]
    assert {row.label for row in chart.rows} <= set(texts) and {"8.03B", "70B", "24 GiB"} <= set(texts)
    assert not re.search(r"(href|src)=|url\(|@import", chart_svg(chart))
    assert chart_svg(chart) == chart_svg(chart)


def test_labels_of_many_lines_neither_overlap_nor_leave_the_figure() -> None:
    many = make_chart(
        {"model": ["1e9", "8e9"], "method": ["full", "lora", "qlora"], "seq": [128, 256, 512, 1024, 2048, 4096, 8192]}
    )
    root = ElementTree.fromstring(chart_svg(many))
    names = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "name"]
    heights = sorted(float(str(e.get("y"))) for e in names)
    assert len(heights) == len(many.rows) == 35
    assert all(below - above >= 14.8 for above, below in itertools.pairwise(heights))
    assert heights[0] > 40 and heights[-1] < float(str(root.get("height")))


def test_what_came_from_names_is_text_everywhere(chart: Chart) -> None:
    named = dataclasses.replace(
        chart,
        columns=tuple(dataclasses.replace(column, name=HOSTILE, parameters=8) for column in chart.columns),
        rows=tuple(dataclasses.replace(row, label=HOSTILE) for row in chart.rows),
        assumptions=HOSTILE,
    )
    assert "\x1b" not in drawn(named, 80) + reports.chart_markdown(named)
    assert "<script" not in chart_svg(named).replace("&lt;script", "") and "<script" not in reports.chart_markdown(
        named
    ).replace("\\<", "")
    ElementTree.fromstring(chart_svg(named))


@pytest.mark.parametrize("width", [40, 60, 100])
def test_each_published_value_is_printed_with_ours(width: int) -> None:
    cells = published_chart()
    text = io.StringIO()
    reports.print_published(Screen(text, width=width, colour=False), cells)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.lstrip().startswith("7B ") for line in lines) == 7  # one for each method
    assert " ".join(cells[0].why.split()[:5]) in text.getvalue()
    rows = list(csv.DictReader(io.StringIO(reports.published_csv(cells))))
    assert len(rows) == len(cells) == reports.published_markdown(cells).count("\n| ")
    assert reports.published_document(cells)["cells"][0]["published_bytes"] == 120 * 10**9
