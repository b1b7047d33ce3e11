"""What a sum of money trains."""

from __future__ import annotations

import pytest

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.result import BudgetEstimate
from estimator.run.cost import RunRequest
from estimator.setup import Setup

SETUP = Setup(model="llama-3.2-1b", batch=4, accelerator="H100-SXM-80GB", accelerators=8)


def budget_of(request: RunRequest, setup: Setup = SETUP) -> BudgetEstimate:
    found = estimate(setup, request=request).budget
    assert found is not None
    return found


def test_a_budget_buys_what_a_run_of_that_size_costs() -> None:
    budget = budget_of(RunRequest(budget_usd=1000, price_usd_per_gpu_hour=2.0))
    assert budget.hours.value == pytest.approx(1000 / 2 / 8)
    for end, money in (("value", "value"), ("low", "high"), ("high", "low")):
        tokens = round(getattr(budget.tokens, end))
        run = estimate(SETUP, request=RunRequest(dataset_tokens=tokens, price_usd_per_gpu_hour=2.0)).run
        assert run is not None and run.cost_usd is not None
        assert getattr(run.cost_usd, money) == pytest.approx(1000, rel=1e-3)


def test_epochs_are_the_budgets_tokens_over_the_data() -> None:
    budget = budget_of(RunRequest(budget_usd=1000, samples=10_000))
    assert budget.epochs is not None
    assert budget.epochs.value == pytest.approx(budget.tokens.value / (10_000 * 2048))
    assert budget_of(RunRequest(budget_usd=1000)).epochs is None


def test_the_optimum_is_twenty_tokens_a_parameter_and_spends_the_same_flops() -> None:
    budget = budget_of(RunRequest(budget_usd=1000))
    result = estimate(SETUP)
    assert result.time is not None
    assert budget.chinchilla_tokens == 20 * result.model.parameters
    flops = budget.steps.value * result.time.model_flops_per_step
    assert 6 * budget.optimal_parameters.value * budget.optimal_tokens.value == pytest.approx(flops)
    assert budget.optimal_tokens.value == pytest.approx(20 * budget.optimal_parameters.value)


def test_chinchilla_itself_is_its_own_optimum() -> None:
    # Hoffmann et al. 2022: 70B parameters on 1.4T tokens, 5.76e23 FLOPs. Priced so that the budget buys just those.
    setup = Setup(model="70e9", seq=2048, accelerator="A100-SXM-80GB", accelerators=1024)
    run = estimate(setup, request=RunRequest(dataset_tokens=14 * 10**11, price_usd_per_gpu_hour=1.0)).run
    assert run is not None and run.cost_usd is not None
    budget = budget_of(RunRequest(budget_usd=run.cost_usd.value, price_usd_per_gpu_hour=1.0), setup)
    assert budget.chinchilla_share.value == pytest.approx(1.0, rel=0.01)
    assert budget.optimal_parameters.value == pytest.approx(70e9, rel=0.05)


def test_more_money_buys_more_and_a_sum_too_small_for_a_step_buys_none() -> None:
    little, more = (budget_of(RunRequest(budget_usd=sum_)).tokens for sum_ in (1000, 1100))
    assert little.low < more.low and little.value < more.value and little.high < more.high
    assert budget_of(RunRequest(budget_usd=0.0001)).tokens.value == 0


@pytest.mark.parametrize(
    ("setup", "request_", "says"),
    [
        (Setup(model="1e9"), RunRequest(budget_usd=10), "--gpu NAME"),
        (
            Setup(model="1e9", accelerator="V100-PCIE-32GB", precision="fp16-mixed"),
            RunRequest(budget_usd=10),
            "--price",
        ),
        (Setup(model="1e9", accelerator="cpu"), RunRequest(budget_usd=10, price_usd_per_gpu_hour=1.0), "no step time"),
        (SETUP, RunRequest(budget_usd=10, price_usd_per_gpu_hour=0.0), "--price above 0"),
    ],
)
def test_a_budget_without_a_price_or_a_time_says_what_is_missing(setup: Setup, request_: RunRequest, says: str) -> None:
    with pytest.raises(InputError) as error:
        estimate(setup, request=request_)
    assert says in str(error.value)
