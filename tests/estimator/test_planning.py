"""The search for plans: what is predicted in bulk is what an estimate says, and the front is a front."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.model.catalog import resolve_model
from estimator.planning.alternatives import alternatives
from estimator.planning.largest import largest
from estimator.planning.layouts import candidates
from estimator.planning.search import Limits, plan
from estimator.planning.space import Space
from estimator.run.cost import RunRequest
from estimator.setup import Setup
from estimator.units import GIB

REQUEST = RunRequest(dataset_tokens=10**8)
NO_LIMITS = Limits()
ONE_CARD = {
    "model": ["qwen1.5-0.5b"], "framework": ["hf-trainer"], "precision": ["fp16-mixed"], "optimizer": ["adamw"],
    "checkpointing": ["none"], "attention": ["sdpa"], "accelerator": ["rtx-3090"], "accelerators": ["1"],
}  # fmt: skip


def test_the_front_is_faster_and_dearer_in_order_and_fits() -> None:
    devices = {"accelerator": ["h100", "a100", "rtx-4090", "b200"], "accelerators": ["1", "2", "4", "8", "16"]}
    space = Space.of({"model": ["qwen2.5-1.5b"], "seq": ["2048"]} | devices)
    plans = plan(space, REQUEST, NO_LIMITS)
    assert len(plans.front) > 2 and plans.fitting <= plans.searched
    paces = [_pace(found) for found in plans.front]
    assert paces == sorted(paces) and [usd for _, usd in paces] == sorted((usd for _, usd in paces), reverse=True)
    assert all(found.fits.fits for found in plans.front)
    assert {found.setup.batch * found.setup.accumulation * found.setup.data_ranks for found in plans.front} == {64}


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_start_up_counts_in_the_front(tokens: int) -> None:
    """A few steps on hundreds of devices are over at once, but several machines take minutes to start."""
    space = Space.of({"model": ["qwen2.5-0.5b"], "seq": ["2048"]})
    front = plan(space, RunRequest(dataset_tokens=tokens), NO_LIMITS).front
    paces = [_pace(found) for found in front]
    assert all(slow[0] > fast[0] and slow[1] < fast[1] for fast, slow in itertools.pairwise(paces))
    assert front[0].setup.accelerators <= front[0].setup.gpus_per_node


def test_no_setup_of_the_space_beats_a_plan_in_both() -> None:
    """One by one, as ``estimate`` predicts them."""
    space = Space.of(
        {"model": ["qwen2.5-0.5b"], "accelerator": ["rtx-4090", "h100"], "accelerators": ["1", "2"], "seq": ["1024"]}
    )
    plans = plan(space, REQUEST, NO_LIMITS)
    shape = resolve_model("qwen2.5-0.5b")
    seen = 0
    for base in space.bases():
        if base.offload:  # every count of these has what fits without
            continue
        columns = candidates(space, shape, base, space.sequences_per_step(10**8))
        for index in range(len(columns["batch"])):
            numbers = {name: int(values[index]) for name, values in columns.items()}
            one = estimate(dataclasses.replace(base, data_parallel=None, **numbers), request=REQUEST)
            seen += 1
            if one.fits.fits:
                assert not any(_beats(one, found) for found in plans.front)
    assert seen == plans.searched


def _beats(one: object, other: object) -> bool:
    """By more than the two per cent that a front leaves out."""
    first, second = (_pace(estimate) for estimate in (one, other))
    return first[0] < second[0] * 0.98 and first[1] < second[1] * 0.98


def _pace(found: object) -> tuple[float, float]:
    """(hours, dollars) of the whole run."""
    run = found.run  # type: ignore[attr-defined]
    return run.hours.value, run.cost_usd.value


def test_limits_are_kept_by_the_whole_run() -> None:
    devices = {"accelerator": ["h100", "a100", "rtx-4090"], "accelerators": ["1", "2", "8"]}
    space = Space.of({"model": ["qwen2.5-1.5b"], "seq": ["2048"]} | devices)
    free = plan(space, REQUEST, NO_LIMITS).front
    assert free[0].run and free[-1].run and free[0].run.cost_usd
    deadline = plan(space, REQUEST, Limits(hours=free[0].run.hours.value * 1.5)).front
    assert deadline and all(found.run and found.run.hours.value <= free[0].run.hours.value * 1.5 for found in deadline)
    budget = plan(space, REQUEST, Limits(usd=free[0].run.cost_usd.value / 2)).front
    assert all(
        found.run and found.run.cost_usd and found.run.cost_usd.value <= free[0].run.cost_usd.value / 2
        for found in budget
    )
    none = plan(space, REQUEST, Limits(hours=1e-6))
    assert not none.front and none.least_hours == pytest.approx(free[0].run.hours.value, rel=0.02)
    assert none.least_usd == pytest.approx(free[-1].run.cost_usd.value, rel=0.02)  # type: ignore[union-attr]


def test_methods_are_compared_where_several_are_given() -> None:
    space = Space.of(
        {
            "model": ["llama-3.1-8b"],
            "method": ["full", "lora", "qlora"],
            "lora_rank": ["8"],
            "accelerator": ["rtx-4090"],
            "accelerators": ["1"],
        }
    )
    bases = list(space.bases())
    assert {(base.method, base.lora_rank) for base in bases} == {("full", None), ("lora", 8), ("qlora", 8)}
    plans = plan(space, REQUEST, NO_LIMITS)
    assert {found.setup.method for found in plans.front} <= {"lora", "qlora"}  # the full fine-tune does not fit


def test_where_nothing_fits_the_nearest_is_named() -> None:
    space = Space.of({"model": ["llama-3.1-405b"], "accelerator": ["rtx-3090"], "accelerators": ["1"]})
    plans = plan(space, REQUEST, NO_LIMITS)
    assert not plans.front and not plans.fitting
    assert plans.nearest is not None and plans.nearest.setup.checkpointing == "full" and plans.nearest.bytes > 100 * GIB


ONE_CARD_FULL = {"model": ["llama-3.1-8b"], "seq": ["2048"], "accelerator": ["rtx-4090"], "accelerators": ["1"]}


def test_offloading_is_what_is_left_where_nothing_else_fits() -> None:
    plans = plan(Space.of(ONE_CARD_FULL), REQUEST, NO_LIMITS)
    assert plans.front and all(found.setup.offload for found in plans.front)
    by_hand = estimate(
        Setup(model="llama-3.1-8b", framework="hf-trainer+deepspeed", sharding="zero2", offload="optimizer",
              checkpointing="full", seq=2048, accelerator="rtx-4090")
    )  # fmt: skip
    assert by_hand.fits.fits
    roomy = plan(Space.of(ONE_CARD_FULL | {"accelerator": ["b200"]}), REQUEST, NO_LIMITS)
    assert roomy.front and not any(found.setup.offload for found in roomy.front)
    asked = plan(Space.of(ONE_CARD_FULL | {"accelerator": ["b200"], "offload": ["optimizer+parameters"], "framework":
                 ["hf-trainer+deepspeed"], "sharding": ["zero3"]}), REQUEST, NO_LIMITS)  # fmt: skip
    assert asked.front and all(found.setup.offload for found in asked.front)


def test_offloading_has_to_fit_the_host() -> None:
    little = dataclasses.replace(REQUEST, host_memory_bytes=64 * GIB)
    space = Space.of(ONE_CARD_FULL)
    assert not plan(space, little, NO_LIMITS).fitting
    assert largest(space, 0, host_memory_bytes=64 * GIB).batch is None
    found = largest(space, 0)
    assert found.batch_setup is not None and found.batch_setup.offload
    # Nobody's machine has the 6 TB that 405B in full would take, though a device would do.
    assert not plan(Space.of(ONE_CARD_FULL | {"model": ["llama-3.1-405b"]}), REQUEST, NO_LIMITS).fitting


def test_other_methods_are_named_where_they_are_cheaper_or_all_that_fits() -> None:
    space = Space.of(ONE_CARD_FULL)
    plans = plan(space, REQUEST, NO_LIMITS)
    found = alternatives(space, REQUEST, NO_LIMITS, plans)
    for other in found:
        assert _pace(other.found)[1] < 0.9 * _pace(plans.front[-1])[1] and other.found.fits.fits
    asked = Space.of(ONE_CARD_FULL | {"method": ["full"]})
    assert not {"--method lora", "--method qlora"} & {o.flags for o in alternatives(asked, REQUEST, NO_LIMITS, plans)}
    little = dataclasses.replace(REQUEST, host_memory_bytes=64 * GIB)
    nothing = plan(asked, little, NO_LIMITS)
    assert "--method qlora" in {other.flags for other in alternatives(asked, little, NO_LIMITS, nothing)}


def test_without_data_plans_are_of_a_billion_tokens_and_keep_no_limit() -> None:
    space = Space.of(ONE_CARD_FULL | {"model": ["qwen2.5-0.5b"]})
    plans = plan(space, RunRequest(), NO_LIMITS)
    assert plans.assumed_tokens == 10**9 and plans.front[0].run and plans.front[0].run.tokens == 10**9
    for limits in (Limits(hours=1.0), Limits(usd=10.0)):
        with pytest.raises(InputError, match="write --dataset-tokens N or --samples N"):
            plan(space, RunRequest(), limits)


def test_a_precision_that_an_accelerator_lacks_does_not_leave_it_out_of_the_others() -> None:
    space = Space.of(
        {"model": ["qwen2.5-0.5b"], "precision": ["fp8-mixed", "bf16-mixed"], "accelerator": ["a100"], "accelerators":
         ["1"], "framework": ["torchtitan"], "sharding": ["none"]}
    )  # fmt: skip
    plans = plan(space, REQUEST, NO_LIMITS)
    assert {found.setup.precision for found in plans.front} == {"bf16-mixed"}


def test_a_denied_plan_makes_way_for_the_next() -> None:
    space = Space.of({"model": ["qwen2.5-1.5b"], "seq": ["2048"], "accelerator": ["h100"], "accelerators": ["1"]})
    asked: list[Setup] = []

    def deny_the_first(setup: Setup) -> bool:
        asked.append(setup)
        return len(asked) > 1

    plans = plan(space, REQUEST, NO_LIMITS, fits=deny_the_first)
    assert plans.front and plans.front[0].setup == asked[1] != asked[0]


@pytest.mark.parametrize(
    ("given", "rest", "message"),
    [
        ({}, {}, "model: write --model"),
        ({"model": ["nano", "micro"]}, {}, "model: a plan is for one model"),
        ({"model": ["nano"], "seq": ["512", "1024"]}, {}, "seq: a plan is for one seq"),
        ({"model": ["nano"], "checkpointing": ["some"]}, {}, "checkpointing: 'some' is not known"),
        ({"model": ["nano"], "accelerator": ["h1000"]}, {}, "accelerator: 'h1000' is not in the catalog"),
    ],
)
def test_bad_spaces_are_one_line(given: dict[str, list[str]], rest: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Space.of(given, **rest)


def test_a_global_batch_that_nothing_makes_is_said() -> None:
    space = Space.of(
        {"model": ["nano"], "accelerator": ["h100"], "accelerators": ["1"], "batch": ["2"]}, global_batch=7
    )
    with pytest.raises(InputError, match="global_batch: no batch"):
        plan(space, REQUEST, NO_LIMITS)


@pytest.mark.parametrize("given", [{"accelerators": ["3"]}, {"batch": ["5"]}, {"accelerators": ["6"], "batch": ["5"]}])
def test_the_global_batch_divides_by_odd_counts_and_batches(given: dict[str, list[str]]) -> None:
    space = Space.of({"model": ["nano"], "accelerator": ["h100"], "seq": ["2048"]} | given)
    front = plan(space, REQUEST, NO_LIMITS).front
    assert front
    for found in front:
        assert 32 <= found.setup.batch * found.setup.accumulation * found.setup.data_ranks <= 64


def test_accelerators_that_a_provider_lacks_are_left_out() -> None:
    for request in (RunRequest(dataset_tokens=10**8, spot=True), RunRequest(dataset_tokens=10**8, provider="Lambda")):
        plans = plan(Space.of({"model": ["nano"]}, most_accelerators=8), request, NO_LIMITS)
        assert plans.front and plans.left_out and set(plans.left_out.values()) == {"no price"}
        assert not {found.setup.accelerator for found in plans.front} & set(plans.left_out)
    with pytest.raises(InputError, match="no on-demand price of nobody for H100"):
        plan(Space.of({"model": ["nano"], "accelerator": ["h100"]}), RunRequest(provider="nobody"), NO_LIMITS)
    with pytest.raises(InputError, match="price: no price"):
        plan(Space.of({"model": ["nano"]}), RunRequest(provider="nobody"), NO_LIMITS)


@pytest.mark.parametrize("limits", [{"usd": 0.0}, {"usd": -3.0}, {"usd": float("nan")}, {"hours": 0.0}])
def test_limits_that_nothing_keeps_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(InputError, match="out of range"):
        Limits(**limits)


def test_the_largest_is_where_the_estimate_turns() -> None:
    found = largest(Space.of(ONE_CARD | {"seq": ["512"]}), 2 * GIB)
    assert found.batch_setup and found.batch and found.seq_setup and found.seq
    request = RunRequest(reserve_bytes=2 * GIB)
    for setup, name, value in ((found.batch_setup, "batch", found.batch), (found.seq_setup, "seq", found.seq)):
        assert estimate(setup, request=request).fits.fits
        more = dataclasses.replace(setup, **{name: value + (1 if name == "batch" else 96)})  # type: ignore[arg-type]
        assert estimate(more, request=request).fits.fits is False


def test_the_largest_moves_to_where_a_judge_says() -> None:
    space = Space.of(ONE_CARD | {"seq": ["512"]})
    for most in (1, 5, 7, 8, 11, 30):
        assert largest(space, 0, fits=lambda setup, most=most: setup.batch <= most and setup.seq <= 1024).batch == most  # type: ignore[misc]
    # Fragments: 8 does not fit, 9 would.
    assert (
        largest(space, 0, fits=lambda setup: setup.batch in (1, 2, 3, 4, 5, 6, 7, 9) and setup.seq <= 1024).batch == 7
    )
    nothing = largest(space, 0, fits=lambda setup: False)
    assert nothing.batch is None and nothing.seq is None
