"""docs/story.md: its sums are the story's, and its commands run and say what it says of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "story.py"
STORY = BENCHMARK.parents[1] / "docs" / "story.md"


@pytest.fixture(scope="module")
def story() -> ModuleType:
    spec = importlib.util.spec_from_file_location("story", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["story"] = module
    spec.loader.exec_module(module)
    return module


def test_the_sum_by_hand_gives_the_storys_figures_and_its_slip(story: ModuleType) -> None:
    text = story.the_sum()
    for figure in (
        "38,400 GiB",
        "| 480 |",
        "375 million",
        "32,106 years",
        "1,528.9 years",
        "9,846 samples",
        "3.7 minutes",
    ):
        assert figure in text, figure


def test_the_document_shows_exactly_the_commands_that_make_it(story: ModuleType) -> None:
    written = re.findall(r"^\$ (.*)$", STORY.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(written) == story.COMMANDS


def test_its_commands_print_the_naive_memory_and_the_proportion_that_the_text_names(story: ModuleType) -> None:
    found = story.document(story.ONE)
    assert found["naive"]["vram_bytes"] == 38_400 * 2**30
    years = float(re.search(r"proportion says ([\d,]+) years", story.the_sum())[1].replace(",", ""))  # type: ignore[index]
    assert found["naive"]["years"] == pytest.approx(years, rel=0.001)
    assert found["fits"]["fits"] is False and found["run"]["tokens"] == 3 * 10**12


def test_each_cluster_of_the_story_holds_the_model_and_more_cards_take_less_time(story: ModuleType) -> None:
    few, many = story.document(story.CLUSTER_480), story.document(story.CLUSTER_10000)
    assert few["fits"]["fits"] is True and many["fits"]["fits"] is True
    assert few["run"]["hours"]["value"] > many["run"]["hours"]["value"]
    assert few["run"]["goodput"]["value"] > many["run"]["goodput"]["value"]


def test_the_mixture_has_the_size_that_its_text_states(story: ModuleType) -> None:
    model = story.document(story.MOE)["model"]
    assert model["parameters"] == pytest.approx(1.8e12, rel=0.005)
    assert model["active_parameters"] == pytest.approx(262e9, rel=0.005)
    assert "262B are active" in story.the_mixture()
