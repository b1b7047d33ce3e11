"""What holds the peak and what would make it fit, on a screen and in the JSON document."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest

from estimator.result import Estimate
from estimator.units import GIB, MIB
from reports.document import estimate_document, render_json
from reports.memory import describe_remedy, group_holders, speed_text
from reports.screen import Screen
from reports.terminal import print_estimate

sys.path.insert(0, str(Path(__file__).parent))
from dry_estimates import REMEDIES, dry_estimate, dry_run


def shown(estimate: Estimate, width: int = 80) -> str:
    file = io.StringIO()
    print_estimate(Screen(file, width=width, colour=False), estimate)
    return file.getvalue()


def test_groups_are_parts_of_a_layer_and_hold_every_byte() -> None:
    groups = group_holders(dry_run().holders)
    assert [(group.name, group.layers, group.bytes) for group in groups] == [
        ("model.layers.*.mlp", 12, 6 * GIB),
        ("model.embed_tokens", 0, GIB),
        ("the loss", 0, GIB - MIB),
        ("lm_head", 0, MIB),
    ]
    assert groups[0].by_category == (("activations", 4 * GIB), ("optimizer", 2 * GIB))


def test_a_dry_run_lists_what_holds_the_peak(estimate: Estimate) -> None:
    lines = [" ".join(line.split()) for line in shown(dry_estimate(estimate)).splitlines()]
    start = lines.index("What holds the peak")
    assert lines[start + 1 : start + 4] == [
        "activations 4.00 GiB model.layers.*.mlp, 12 layers",
        "optimizer 2.00 GiB model.layers.*.mlp, 12 layers",
        "parameters 1.00 GiB model.embed_tokens",
    ]
    assert "What holds the peak" not in shown(estimate)


def test_what_fits_is_listed_with_its_peak_and_its_price(estimate: Estimate) -> None:
    text = shown(dry_estimate(estimate), width=100)
    assert "- --checkpointing full: 6.00 GiB (-4.00 GiB), about 30% slower\n" in text
    assert "- --method lora: 5.00 GiB (-5.00 GiB), 2.0 times as fast, trains adapters only\n" in text
    assert "adamw-paged" not in text  # it does not fit, and others do
    assert "What would make it fit" not in shown(estimate)


def test_where_nothing_keeps_the_result_what_saves_most_is_listed(estimate: Estimate) -> None:
    text = shown(dataclasses.replace(dry_estimate(estimate), remedies=REMEDIES[2:]), width=100)
    assert "No change that vramcalc knows is enough." in text
    assert "Not enough alone:\n  - --optimizer adamw-paged: 9.00 GiB (-1.00 GiB), time not predicted\n" in text


@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_wider_than_the_terminal(estimate: Estimate, width: int) -> None:
    assert max(map(len, shown(dry_estimate(estimate), width).splitlines())) <= width


@pytest.mark.parametrize(
    ("slower", "text"),
    [(1.3, "about 30% slower"), (2.5, "2.5 times as slow"), (1.0, "no slower"), (0.97, "no slower"), (0.25, "4.0 times as fast"), (None, "time not predicted")],
)  # fmt: skip
def test_a_price_in_time_reads_as_people_say_it(slower: float | None, text: str) -> None:
    assert speed_text(slower) == text


def test_a_larger_device_saves_nothing_and_says_so() -> None:
    larger = dataclasses.replace(
        REMEDIES[0], flags="--gpu h200", peak_device_bytes=11 * GIB, saved_bytes=-GIB, slower=0.5
    )
    assert describe_remedy(larger) == "--gpu h200: 11.0 GiB, 2.0 times as fast"


def test_the_document_has_holders_and_remedies_in_base_units(estimate: Estimate) -> None:
    document = json.loads(render_json(estimate_document(dry_estimate(estimate))))
    assert document["memory"]["holders"][0] == {
        "module": "model.layers.*.mlp.up_proj", "category": "activations", "bytes": 3 * GIB, "layers": 12,
    }  # fmt: skip
    assert document["remedies"][0] == {
        "change": {"checkpointing": "full"}, "flags": "--checkpointing full", "peak_device_bytes": 6 * GIB,
        "saved_bytes": 4 * GIB, "slower": 1.3, "fits": True, "note": "",
    }  # fmt: skip
    plain = estimate_document(estimate)
    assert plain["memory"]["holders"] is None and plain["remedies"] == []
