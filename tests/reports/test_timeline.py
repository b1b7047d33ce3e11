"""The page of a dry run: what it says, how large it is, and that names cannot break out of it."""

import json
import re
import sys
from pathlib import Path

import pytest

from estimator.result import Estimate
from estimator.units import GIB
from reports.timeline import render_timeline
from reports.timeline_figure import HEIGHT, WIDTH, timeline_figure

sys.path.insert(0, str(Path(__file__).parent))
from dry_estimates import dry_estimate, dry_run

HOSTILE = "<script>document.title='owned'</script>\"onload=\"x"


def test_the_page_says_what_the_peak_is_made_of_and_what_fits(estimate: Estimate) -> None:
    page = render_timeline(dry_estimate(estimate))
    assert "The tensors reach 8.00 GiB in forward: 4.00 GiB of activations, 2.00 GiB of optimizer states" in page
    assert "2.00 GiB too much on RTX-3090" in page
    assert "<code>--checkpointing full</code>" in page and "6.00 GiB (-4.00 GiB), about 30% slower" in page
    assert "model.layers.*.mlp" in page
    assert "5 of its 12 layers" in page


def test_the_page_is_the_same_for_the_same_estimate_and_loads_nothing(estimate: Estimate) -> None:
    page = render_timeline(dry_estimate(estimate))
    assert page == render_timeline(dry_estimate(estimate))
    assert not re.search(r"(?:src|href)=(?![\"']?(?:#|data:))|url\(|@import", page)


def test_names_are_text(estimate: Estimate) -> None:
    page = render_timeline(dry_estimate(estimate, name=HOSTILE))
    assert "document.title=" not in page.replace("document.title=&#39;owned&#39;", "")


def test_a_device_of_unknown_memory_has_no_line(estimate: Estimate) -> None:
    assert 'class="capacity"' not in render_timeline(dry_estimate(estimate, capacity_bytes=None))
    assert 'class="capacity"' in render_timeline(dry_estimate(estimate))
    far = render_timeline(dry_estimate(estimate, capacity_bytes=80 * GIB))
    assert 'class="capacity"' not in far and "beyond the figure" in far


def heights(path: str) -> list[float]:
    """Every level of a stepped outline, from the axis up, in shares of the plot."""
    return [1 - float(y) / HEIGHT for y in re.findall(r"(?:^M0 |V)(-?[\d.]+)", path)]


def test_areas_stack_to_the_total_and_the_top_is_never_cut() -> None:
    figure = timeline_figure(dry_run(), 8 * GIB, cuda=True)
    assert [band.category for band in figure.bands] == ["logits", "activations", "gradients", "optimizer", "parameters"]
    assert max(heights(figure.bands[0].path)) == pytest.approx(figure.peak.height / 100, abs=1 / HEIGHT)
    # Parameters are an eighth of the peak, and the reserved segments nine eighths.
    assert max(heights(figure.bands[-1].path)) == pytest.approx(figure.peak.height / 800, abs=1 / HEIGHT)
    assert max(heights(figure.reserved)) == pytest.approx(figure.peak.height / 100 * 9 / 8, abs=1 / HEIGHT)
    assert all(0 <= height <= 1 for band in figure.bands for height in heights(band.path))
    assert figure.capacity is not None and figure.capacity.height == pytest.approx(figure.peak.height)


def test_phases_fill_the_width_in_order_and_a_short_one_can_be_seen() -> None:
    figure = timeline_figure(dry_run(), None, cuda=True)
    assert [stretch.phase for stretch in figure.stretches] == ["forward", "loss", "backward", "optimizer"]
    assert sum(stretch.width for stretch in figure.stretches) == pytest.approx(100)
    for before, after in zip(figure.stretches, figure.stretches[1:], strict=False):
        assert before.left + before.width == pytest.approx(after.left)
    assert figure.stretches[1].width > 5  # two events of eight hundred
    assert figure.stretches[1].left < figure.peak_left < figure.stretches[2].left


def test_the_scripts_moments_are_the_timeline() -> None:
    found = dry_run()
    figure = timeline_figure(found, None, cuda=True)
    document = json.loads(figure.moments)
    assert len(document["moments"]) == len(found.timeline)
    peak = document["moments"][figure.peak_moment]
    assert document["phases"][peak[1]] == "loss" and peak[2] == found.peak_event
    assert sum(peak[4:]) * 2**20 == found.peak_allocated_bytes and peak[3] * 2**20 == found.peak_reserved_bytes
    lefts = [moment[0] for moment in document["moments"]]
    assert lefts == sorted(lefts) and lefts[0] == 0 and lefts[-1] == 1


def test_ticks_are_round_and_within_the_plot() -> None:
    ticks = timeline_figure(dry_run(), None, cuda=True).ticks
    assert [tick.text for tick in ticks] == ["0", "2 GiB", "4 GiB", "6 GiB", "8 GiB"]
    assert all(0 <= tick.height <= 100 for tick in ticks)


def test_a_cpu_has_no_segments(estimate: Estimate) -> None:
    assert timeline_figure(dry_run(), None, cuda=False).reserved == ""
    assert WIDTH > HEIGHT
