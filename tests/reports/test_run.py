"""A whole run and a budget on a screen and in the document."""

from __future__ import annotations

import io
import json

import pytest

from estimator.estimate import estimate
from estimator.result import Estimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from reports.document import estimate_document, render_json
from reports.screen import Screen
from reports.terminal import print_estimate


@pytest.fixture(scope="module")
def cluster() -> Estimate:
    setup = Setup(
        model="llama-3.1-405b", accelerator="H100-SXM-80GB", accelerators=16384, tensor_parallel=8, pipeline_parallel=16,
        accumulation=16, seq=8192,
    )  # fmt: skip
    return estimate(setup, request=RunRequest(dataset_tokens=10**12, budget_usd=10**6, eval_samples=1000))


def printed(result: Estimate, width: int = 80) -> str:
    text = io.StringIO()
    print_estimate(Screen(text, width=width, colour=False), result)
    return text.getvalue()


def test_a_cluster_is_told_its_failures_files_price_and_power_with_their_sources(cluster: Estimate) -> None:
    text = " ".join(printed(cluster).split())
    for said in ("restarts", "goodput", "of which", "failures", "median of", "dated", "700 W a device", "g/kWh, IEA"):
        assert said in text, said
    assert cluster.run is not None
    assert f"checkpoints {cluster.run.checkpoints:,} every {cluster.run.save_every_steps} steps" in text


def test_a_budget_says_tokens_and_how_far_from_the_optimum_that_is(cluster: Estimate) -> None:
    text = " ".join(printed(cluster).split())
    assert "What $1M trains" in text or "What $1.00M trains" in text
    assert "20 a parameter" in text and "epochs" in text and "pretrains best a dense model of" in text


@pytest.mark.parametrize("width", [60, 100])
def test_no_line_is_wider_than_the_terminal(cluster: Estimate, width: int) -> None:
    assert max(map(len, printed(cluster, width).splitlines())) <= width


def test_a_small_run_is_not_told_of_failures() -> None:
    result = estimate(Setup(model="nano", accelerator="RTX-3090"), request=RunRequest(samples=1000))
    assert "restarts" not in printed(result) and "trains (" not in printed(result)


def test_the_document_has_the_parts_of_the_time_and_the_budget(cluster: Estimate) -> None:
    document = json.loads(render_json(estimate_document(cluster)))
    run = document["run"]
    assert sum(run["parts_hours"].values()) == pytest.approx(run["hours"]["value"])
    assert set(run["parts_hours"]) == {"start-up", "steps", "evaluation", "checkpoints", "failures"}
    assert run["checkpoint_written_bytes"] == run["checkpoints"] * document["checkpoint"]["bytes"]
    assert run["co2_kg"]["low"] < run["co2_kg"]["value"] < run["co2_kg"]["high"]
    assert document["budget"]["tokens"]["value"] == cluster.budget.tokens.value  # type: ignore[union-attr]
    plain = estimate_document(estimate(Setup(model="nano")))
    assert plain["budget"] is None and set(plain["run"]) == set(run)
