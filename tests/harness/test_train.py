"""A whole fine-tune in this process: what it writes, refuses, keeps and compares."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import harness.train
import harness.train_rank
from estimator.errors import DoesNotFitError, InputError
from estimator.result import Estimate
from estimator.setup import Setup
from harness.checkpoints import checkpoints
from harness.plan import TrainPlan
from harness.train import TrainProgress, train
from harness.train_result import read_result
from harness.training_log import read_log
from profiler.device import LocalDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the figures are a CPU's")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [{"text": f"Sample {i}: " + " ".join(f"the word {i * j % 97} of it" for j in range(12))} for i in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def plan(tmp_path: Path, cache: Path, data: Path) -> Callable[..., TrainPlan]:
    def make(**changes: Any) -> TrainPlan:
        setup = {"model": "nano", "precision": "fp32", "seq": 16, "batch": 2} | changes.pop("setup", {})
        given: dict[str, Any] = {
            "out": tmp_path / "run",
            "cache": cache,
            "data": str(data),
            "samples": 8,
            "epochs": 3,
            "learning_rate": 1e-3,
        }
        return TrainPlan(setup=Setup(**setup), **(given | changes))

    return make


Plan = Callable[..., TrainPlan]


def test_a_run_leaves_its_log_its_newest_checkpoints_a_model_and_a_result(plan: Plan) -> None:
    told: list[TrainProgress] = []
    estimates: list[Estimate] = []
    asked = plan()
    result = train(asked, on_progress=told.append, on_estimate=estimates.append)
    entries = read_log(asked.out / "training_log.jsonl")
    assert [(e.step, e.kind) for e in entries] == [
        (step, kind) for step in range(1, 13) for kind in (("train", "eval") if step % 4 == 0 else ("train",))
    ]
    assert [e.traced for e in entries if e.kind == "train"] == [True] * 2 + [False] * 10
    assert entries[0].learning_rate == 1e-3
    assert [e.epoch for e in entries if e.kind == "eval"] == [1.0, 2.0, 3.0]
    assert result == read_result(asked.out / "result.json")
    assert (result.steps, result.epochs, result.samples, result.tokens) == (12, 3.0, 8, 12 * 2 * 16)
    assert result.final_loss < result.first_loss
    assert result.first_loss == entries[0].loss and result.final_evaluation_loss == entries[-1].loss
    assert (told[0].step, told[-1].step, told[-1].steps) == (0, 12, 12)
    assert told[-1].evaluation_loss == result.final_evaluation_loss
    assert len(estimates) == 1 and estimates[0].checkpoint.bytes > 10**7
    best = int(result.best_checkpoint.removeprefix("checkpoint-"))
    assert {c.step for c in checkpoints(asked.out)} == {8, 12, best}


def test_what_was_predicted_is_compared_with_what_was_measured(plan: Plan) -> None:
    result = train(plan())
    rows = {row.quantity: row for row in result.comparisons}
    assert list(rows) == [
        "peak allocated",
        "peak reserved",
        "peak device",
        "step time",
        "throughput",
        "training time",
        "checkpoint",
    ]
    assert all(row.measured is not None and row.measured > 0 for row in rows.values())
    for quantity, error in (("peak allocated", 0.05), ("checkpoint", 0.005)):
        predicted, measured = rows[quantity].predicted, rows[quantity].measured
        assert predicted is not None and measured is not None
        assert abs(predicted.value / measured - 1) < error, quantity
    written = sum(file.stat().st_size for file in checkpoints(plan().out)[-1].path.iterdir())
    assert rows["checkpoint"].measured == written
    assert rows["throughput"].measured == pytest.approx(2 * 16 / rows["step time"].measured)  # type: ignore[operator]


def test_the_final_model_loads_with_its_tokenizer_and_has_the_last_weights(plan: Plan) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = plan()
    train(asked)
    directory = asked.out / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
    assert model(torch.tensor([tokenizer("Hello")["input_ids"]])).logits.shape[-1] == 8192
    last = load_file(asked.out / "checkpoint-12" / "model.safetensors")
    final = load_file(directory / "model.safetensors")
    assert last.keys() == final.keys() and all(torch.equal(last[name], final[name]) for name in last)


def test_the_model_that_was_trained_can_be_trained_again(plan: Plan, tmp_path: Path) -> None:
    first = train(plan())
    again = train(plan(setup={"model": str(plan().out / "model")}, out=tmp_path / "again"))
    assert again.first_loss < first.first_loss - 0.1


def test_a_finished_run_is_read_and_not_trained_again(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(plan())
    monkeypatch.setattr(harness.train_rank, "build_model", lambda *args, **kwargs: pytest.fail("it trains again"))
    assert train(plan()) == result


def test_a_run_killed_after_its_last_checkpoint_only_writes_its_result(plan: Plan) -> None:
    asked = plan()
    whole = train(asked)
    (asked.out / "result.json").unlink()
    shutil.rmtree(asked.out / "model")
    again = train(asked)
    assert (again.final_loss, again.final_evaluation_loss) == (whole.final_loss, whole.final_evaluation_loss)
    measured = {row.quantity: row.measured for row in again.comparisons}
    assert measured["peak allocated"] is None and measured["step time"] == pytest.approx(
        {row.quantity: row.measured for row in whole.comparisons}["step time"]
    )


def test_the_same_plan_in_two_directories_has_the_same_losses(plan: Plan, tmp_path: Path) -> None:
    one, two = train(plan()), train(plan(out=tmp_path / "other"))
    assert [e.loss for e in read_log(plan().out / "training_log.jsonl")] == [
        e.loss for e in read_log(tmp_path / "other" / "training_log.jsonl")
    ]
    assert one.final_loss == two.final_loss != train(plan(out=tmp_path / "third", seed=1)).final_loss


def test_a_run_that_is_interrupted_keeps_its_last_checkpoint_and_resumes(plan: Plan, tmp_path: Path) -> None:
    def interrupt(progress: TrainProgress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(plan(), on_progress=interrupt)
    assert [c.step for c in checkpoints(plan().out)] == [4]
    resumed, whole = train(plan()), train(plan(out=tmp_path / "whole"))
    assert [e.loss for e in read_log(plan().out / "training_log.jsonl")] == [
        e.loss for e in read_log(tmp_path / "whole" / "training_log.jsonl")
    ]
    peaks = [{row.quantity: row.measured for row in result.comparisons} for result in (resumed, whole)]
    assert peaks[0]["peak allocated"] == pytest.approx(peaks[1]["peak allocated"], rel=0.01)


def test_an_unfinished_checkpoint_is_removed_and_not_resumed_from(plan: Plan) -> None:
    asked = plan()
    train(asked)
    half = asked.out / ".incomplete" / "checkpoint-99"
    half.mkdir(parents=True)
    (asked.out / "result.json").unlink()
    train(asked)
    assert not half.parent.exists()
    assert [c.step for c in checkpoints(asked.out)][-1] == 12


def test_the_best_checkpoint_stays_when_newer_ones_are_worse(plan: Plan) -> None:
    """A learning rate at which this data is overfitted: the held-out loss has its minimum early."""
    asked = plan(samples=4, epochs=24, learning_rate=5e-3, keep=1)
    result = train(asked)
    evaluations = [e for e in read_log(asked.out / "training_log.jsonl") if e.kind == "eval"]
    lowest = min(evaluations, key=lambda e: e.loss)
    assert result.best_checkpoint == f"checkpoint-{lowest.step}" and lowest.step < result.steps
    assert {c.step for c in checkpoints(asked.out)} == {lowest.step, result.steps}
    assert result.overfit_epoch == lowest.epoch
    assert result.final_loss < 3 < result.final_evaluation_loss


def test_another_plan_in_the_same_directory_is_refused_and_restart_overrides(plan: Plan) -> None:
    train(plan())
    with pytest.raises(InputError, match=r"holds a run with learning_rate 0.001, not 0.002; write --restart"):
        train(plan(learning_rate=2e-3))
    result = train(plan(learning_rate=2e-3, epochs=1, restart=True))
    assert [c.step for c in checkpoints(plan().out)] == [4]
    assert result.steps == len([e for e in read_log(plan().out / "training_log.jsonl") if e.kind == "train"]) == 4


def test_restarting_with_a_plan_that_is_refused_keeps_the_earlier_run(plan: Plan) -> None:
    result = train(plan())
    with pytest.raises(InputError, match="samples: "):
        train(plan(samples=10**6, restart=True))
    with pytest.raises(DoesNotFitError):
        train(plan(setup={"model": "llama-3.1-70b"}, restart=True))
    assert train(plan()) == result


def test_resuming_reads_only_what_cannot_run_code(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(4, plan())
    loaded: list[tuple[str, object]] = []
    original = torch.load

    def spy(file: Any, *args: Any, **options: Any) -> Any:
        loaded.append((Path(file).name, options.get("weights_only")))
        return original(file, *args, **options)

    monkeypatch.setattr(torch, "load", spy)
    train(plan())
    assert sorted(loaded) == [("optimizer.pt", True), ("rng_state.pth", True), ("scheduler.pt", True)]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_one_clear_line(plan: Plan, name: str) -> None:
    asked = plan()
    interrupt_after(4, asked)
    file = asked.out / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(InputError, match=r"out: .*checkpoint-4 is damaged \(.*\); delete it to go on") as raised:
        train(asked)
    assert "\n" not in str(raised.value)


def interrupt_after(step: int, asked: TrainPlan) -> None:
    """Trains until the step after this one, whose checkpoint is then there."""

    def interrupt(progress: TrainProgress) -> None:
        if progress.step > step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(asked, on_progress=interrupt)


def test_what_cannot_fit_in_memory_is_refused_before_anything_is_built_or_kept(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.train_rank, "build_model", lambda *args, **kwargs: pytest.fail("it was built"))
    with pytest.raises(DoesNotFitError, match=r"memory: a step needs \d+\.\d+ GiB .* GiB free; .* --force"):
        train(plan(setup={"model": "llama-3.1-70b"}))
    assert not plan().out.exists()


def test_on_a_gpu_what_others_hold_is_read_before_anything_initialises_cuda(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def arguments(plan: TrainPlan, device: LocalDevice, *, launches: bool) -> None:
        order.append("arguments")
        raise InputError("far enough")

    gpu = LocalDevice(name="RTX-3090", kind="cuda", description="x", capacity_bytes=2**34, free_bytes=2**34)
    monkeypatch.setattr(harness.train, "local_device", lambda: gpu)
    monkeypatch.setattr(harness.train, "memory_meter", lambda device, number: order.append(f"meter of {device.kind}"))
    monkeypatch.setattr(harness.train, "_check_arguments", arguments)
    with pytest.raises(InputError, match="far enough"):
        train(plan())
    assert order == ["meter of cuda", "arguments"]


def test_memory_that_others_hold_does_not_count_as_free(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    full = LocalDevice(name="cpu", kind="cpu", description="x", capacity_bytes=2**40, free_bytes=2**20)
    monkeypatch.setattr(harness.train, "local_device", lambda: full)
    with pytest.raises(DoesNotFitError, match=r"cpu has 0\.00 GiB free"):
        train(plan())


def test_checkpoints_that_would_fill_the_disk_are_refused_with_the_numbers_and_force_overrides(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(plan().out.parent)
    little = dataclasses.make_dataclass("Usage", ["total", "used", "free"])(
        usage.total, usage.total - 3 * 10**7, 3 * 10**7
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(
        DoesNotFitError, match=r"disk: checkpoints and model take 0\.05 GB \(0\.01 each\) and .* 0\.03 GB"
    ):
        train(plan())
    assert not plan().out.exists()
    assert train(plan(force=True)).steps == 12


def test_a_disk_that_fills_up_meanwhile_ends_the_run_with_its_checkpoints_whole(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    asked = plan()

    def fill_up(progress: TrainProgress) -> None:
        if progress.step == 6:
            usage = real(asked.out)
            little = dataclasses.make_dataclass("Usage", ["total", "used", "free"])(
                usage.total, usage.total - 1000, 1000
            )
            monkeypatch.setattr(shutil, "disk_usage", lambda path: little)

    with pytest.raises(DoesNotFitError, match=r"disk: a checkpoint takes 14,2\d\d,\d\d\d B and .* has 1,000 B free"):
        train(asked, on_progress=fill_up)
    assert [c.step for c in checkpoints(asked.out)] == [4]
    monkeypatch.setattr(shutil, "disk_usage", real)
    assert train(asked).steps == 12


def test_running_out_of_memory_is_does_not_fit_and_not_a_bug(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.trainer import PhaseTrainer

    def no_memory(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(PhaseTrainer, "training_step", no_memory)
    with pytest.raises(DoesNotFitError, match=r"memory: the training ran out of it .* write a smaller --batch"):
        train(plan())


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_logged(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"learning_rate: the \w+ loss is (nan|inf) after step \d+; write a lower"):
        train(plan(learning_rate=1e30))
    assert all(e.loss < 1e30 for e in read_log(plan().out / "training_log.jsonl"))


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ({"accelerator": "h100-sxm-80gb"}, "accelerator: h100-sxm-80gb is not what this machine has"),
        ({"accelerators": 4, "pipeline_parallel": 2}, "pipeline_parallel: 2 can be estimated but not run here"),
        ({"accelerators": 2, "sharding": "zero3"}, "sharding: zero3 can be estimated but not run here"),
        ({"framework": "megatron"}, "framework: megatron can be estimated but not run here"),
        ({"precision": "fp16-mixed"}, "precision: fp16 autocast"),
        ({"model": "no-such-model"}, "model: 'no-such-model' is not in the catalog"),
        ({"offload": "optimizer"}, "offload: optimizer can be estimated but not run"),
    ],
)
def test_what_cannot_run_here_is_refused_before_any_work(
    plan: Plan, setup: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.train_rank, "build_model", lambda *args, **kwargs: pytest.fail("it was built"))
    with pytest.raises(InputError) as raised:
        train(plan(setup=setup))
    assert message in str(raised.value)
    assert not plan().out.exists()


def test_data_that_cannot_be_read_leaves_no_directory_behind(plan: Plan) -> None:
    with pytest.raises(InputError, match=r"data: no file 'no-such-file\.jsonl'"):
        train(plan(data="no-such-file.jsonl"))
    assert not plan().out.exists()
