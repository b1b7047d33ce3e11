"""The parts of a fine-tune that need no model: plan, schedule, log, overfitting, checkpoint directories, result."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.setup import Setup
from estimator.units import Interval
from harness import checkpoints as on_disk
from harness.checkpoints import checkpoints, complete, discard, prune, remove_leftovers, staging_directory
from harness.data import TokenData
from harness.plan import TrainPlan, claim_identity, run_identity, schedule
from harness.run_directory import forget_run, run_directory
from harness.train_result import PredictedMeasured, TrainResult, read_result, write_result
from harness.training_log import LogEntry, TrainingLog, median_step_seconds, overfit_epoch, read_log


def plan_of(out: Path, **changes: Any) -> TrainPlan:
    setup = Setup(**{"model": "nano", "seq": 100, "batch": 2, "accumulation": 3} | changes.pop("setup", {}))
    return TrainPlan(setup=setup, out=out, **changes)


def data_of(samples: int) -> TokenData:
    nothing: Any = None
    return TokenData(
        name="story", train=nothing, evaluation=nothing, tokens=samples * 100, samples=samples, fingerprint="f"
    )


# --- plan and schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": {"seq": 1}}, "seq: in a sequence of 1 token there is no next one to learn"),
        ({"epochs": 0}, "epochs: 0 is too small; write --epochs 1 or more"),
        ({"save_steps": -1}, "save_steps: -1 is too small; write --save-steps 1 or more"),
        ({"keep": 0}, "keep: 0 is too small; write --keep 1 or more"),
        ({"samples": 5, "dataset_tokens": 5}, "write --dataset-tokens or --samples, not both"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not a rate; write for example --learning-rate 5e-5"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not a rate"),
        ({"seed": -1}, "seed: -1 is not in 0 to 4294967295"),
        ({"prompt_format": "poem"}, "prompt_format: 'poem' is not known"),
    ],
)
def test_a_plan_that_means_nothing_names_the_field_and_what_to_write(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as raised:
        plan_of(tmp_path, **changes)
    assert message in str(raised.value)


def test_an_epoch_is_whole_steps_and_leaves_out_what_fills_none(tmp_path: Path) -> None:
    steps = schedule(plan_of(tmp_path, epochs=4), data_of(50))
    assert (steps.steps_per_epoch, steps.samples, steps.steps, steps.epochs) == (8, 48, 32, 4.0)


def test_steps_take_the_place_of_epochs(tmp_path: Path) -> None:
    steps = schedule(plan_of(tmp_path, steps=13), data_of(50))
    assert (steps.steps, steps.epochs) == (13, 13 / 8)
    assert [step for step in range(1, 14) if steps.evaluates_after(step)] == [8, 13]
    assert [step for step in range(1, 14) if steps.saves_after(step)] == [8, 13]


def test_evaluations_and_checkpoints_may_come_at_other_steps_and_always_at_the_end(tmp_path: Path) -> None:
    steps = schedule(plan_of(tmp_path, epochs=2, save_steps=5, eval_steps=3), data_of(50))
    assert [step for step in range(1, 17) if steps.evaluates_after(step)] == [3, 6, 8, 9, 12, 15, 16]
    assert [step for step in range(1, 17) if steps.saves_after(step)] == [5, 10, 15, 16]


def test_an_amount_of_tokens_is_rounded_up_to_sequences(tmp_path: Path) -> None:
    assert schedule(plan_of(tmp_path, dataset_tokens=1101), data_of(50)).samples == 12


def test_asking_for_more_than_the_data_has_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="samples: story has 50 sequences of 100 tokens, not 51; write --samples 50"):
        schedule(plan_of(tmp_path, samples=51), data_of(50))
    with pytest.raises(InputError, match=r"dataset_tokens: story has 50 .* write --dataset-tokens 5000 or less"):
        schedule(plan_of(tmp_path, dataset_tokens=5001), data_of(50))


def test_less_data_than_a_step_takes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch: one step takes 6 sequences and an epoch of story has 5"):
        schedule(plan_of(tmp_path), data_of(5))


def identity_of(plan: TrainPlan) -> dict[str, Any]:
    return run_identity(plan, schedule(plan, data_of(50)), data_of(50))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"learning_rate": 1e-4}, "learning_rate 5e-05, not 0.0001"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"setup": {"precision": "fp32"}}, "precision bf16-mixed, not fp32"),
        ({"epochs": 5}, "steps 24, not 40"),
        ({"eval_steps": 5}, "eval_steps None, not 5"),
    ],
)
def test_another_plan_in_the_same_directory_is_refused_with_the_difference(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    assert not claim_identity(tmp_path, identity_of(plan_of(tmp_path)))
    assert claim_identity(tmp_path, identity_of(plan_of(tmp_path)))
    with pytest.raises(InputError, match=f"holds a run with {field}; write --restart to begin anew"):
        claim_identity(tmp_path, identity_of(plan_of(tmp_path, **changes)))


def test_how_many_checkpoints_are_kept_may_change_between_resumptions(tmp_path: Path) -> None:
    claim_identity(tmp_path, identity_of(plan_of(tmp_path, keep=2)))
    assert claim_identity(tmp_path, identity_of(plan_of(tmp_path, keep=5)))


def test_a_damaged_identity_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged; write --restart"):
        claim_identity(tmp_path, identity_of(plan_of(tmp_path)))


# --- the log ----------------------------------------------------------------------------------------------------------


def entry(step: int, loss: float, kind: str = "train", **more: Any) -> LogEntry:
    return LogEntry(step=step, epoch=step / 10, kind=kind, loss=loss, seconds=more.pop("seconds", 0.5), **more)


def test_what_was_appended_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    written = [entry(1, 1 / 3, learning_rate=5e-5, traced=True), entry(2, 2**0.5), entry(2, 1e-300, "eval")]
    log = TrainingLog(tmp_path, resumed_step=0)
    for each in written:
        log.append(each)
    log.close()
    assert read_log(tmp_path / "training_log.jsonl") == written


@given(cut=st.integers(1, 400), resumed=st.integers(0, 6))
def test_a_log_cut_at_any_byte_resumes_without_losing_or_repeating_a_step(cut: int, resumed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        log = TrainingLog(out, resumed_step=0)
        for step in range(1, 7):
            log.append(entry(step, 1 / step))
        log.close()
        whole = log.path.read_bytes()
        log.path.write_bytes(whole[:-cut])
        there = [each.step for each in read_log(log.path)]
        again = TrainingLog(out, resumed_step=resumed)
        assert [each.step for each in again.entries] == [step for step in there if step <= resumed]
        for step in range(len(again.entries) + 1, 7):
            again.append(entry(step, 1 / step))
        again.close()
        assert log.path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_one_clear_line(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        log.append(entry(step, 1.0))
    log.close()
    for damage in ("nonsense", "[]", '{"step": 2}', '{"step": 2, "epoch": 1, "kind": "x", "loss": 1, "seconds": 1}'):
        lines = log.path.read_text().splitlines()
        log.path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
        with pytest.raises(InputError, match=r"line 2 of .*training_log\.jsonl is damaged; write --restart"):
            read_log(log.path)


def test_the_report_reads_this_log(tmp_path: Path) -> None:
    from reports.training import parse_training

    log = TrainingLog(tmp_path, resumed_step=0)
    log.append(entry(10, 3.0, learning_rate=1e-4))
    log.append(entry(10, 3.5, "eval"))
    log.close()
    training = parse_training(log.path.read_text(), None, name="run")
    assert [(p.step, p.epoch, p.loss) for p in (*training.train, *training.evaluation)] == [
        (10, 1.0, 3.0),
        (10, 1.0, 3.5),
    ]


def test_traced_steps_do_not_count_in_the_median_step() -> None:
    entries = [entry(1, 1.0, seconds=9.0, traced=True), *(entry(s, 1.0, seconds=s / 10) for s in (2, 3, 4))]
    assert median_step_seconds([*entries, entry(4, 1.0, "eval", seconds=100.0)]) == 0.3
    assert median_step_seconds(entries[:1]) is None


# --- overfitting ------------------------------------------------------------------------------------------------------


def losses(train: list[float], evaluation: list[float]) -> list[LogEntry]:
    """One training entry and one evaluation an epoch of ten steps."""
    entries = [entry(10 * (i + 1), loss) for i, loss in enumerate(train)]
    return entries + [entry(10 * (i + 1), loss, "eval") for i, loss in enumerate(evaluation)]


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ([3.0, 2.0, 1.5, 1.0], [2.9, 2.5, 2.6, 2.8], 2.0),  # the story: after two epochs
        ([3.0, 2.0, 1.5, 1.0], [2.5, 2.6, 2.7, 2.8], 1.0),  # from the first epoch on
        ([3.0, 2.0, 1.5, 1.0], [2.9, 2.5, 2.9, 2.6], 2.0),  # up and down, but never back
        ([3.0, 2.0, 1.5, 1.0], [2.9, 2.5, 2.4, 2.3], None),  # still falling
        ([3.0, 2.0, 1.5, 1.0], [2.5, 2.6, 2.7, 2.4], None),  # it came back
        ([3.0, 2.0, 1.5, 1.0], [2.9, 2.5, 2.5, 2.5], None),  # it stands still
        ([3.0, 2.0, 2.1, 2.2], [2.9, 2.5, 2.6, 2.8], None),  # both rise: that is divergence, not overfitting
        ([3.0], [2.9], None),
        ([3.0, 2.0], [], None),
        ([], [], None),
    ],
)
def test_overfitting_starts_where_held_out_loss_rises_for_good_while_training_loss_falls(
    train: list[float], evaluation: list[float], expected: float | None
) -> None:
    assert overfit_epoch(losses(train, evaluation)) == expected


# --- checkpoint directories -------------------------------------------------------------------------------------------


def write_checkpoint(directory: Path, step: int) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"m" * step)
    (path / "optimizer.pt").write_bytes(b"o" * step)
    return path


def files_of(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_checkpoints_are_those_with_exactly_that_name_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        write_checkpoint(tmp_path, step)
    for other in (".incomplete", ".discarded-checkpoint-5", "checkpoint-best", "checkpoint-7.old", "model"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [3, 20, 100]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        write_checkpoint(tmp_path, step)
    prune(tmp_path, keep=2, spared=3)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [3, 6, 7]
    prune(tmp_path, keep=5, spared=None)
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [3, 6, 7]


def interrupted_after(calls: int, action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs ``action``, ending it at the given call to the file system as a kill would; whether it was ended."""
    left = [calls]

    class Killed(BaseException):
        pass

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "fsync"), (Path, "rename")):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True
    return False


def test_a_kill_at_any_call_while_completing_or_pruning_leaves_only_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(out: Path) -> None:
        complete(out, 3)
        prune(out, keep=1, spared=2)

    for calls in range(100):
        out = tmp_path / str(calls)
        for step in (1, 2):
            write_checkpoint(out, step)
        write_checkpoint(staging_directory(out), 3)
        killed = interrupted_after(calls, lambda out=out: act(out), monkeypatch)  # type: ignore[misc]
        for checkpoint in checkpoints(out):
            assert files_of(checkpoint.path) == ["model.safetensors", "optimizer.pt"]
        assert {c.step for c in checkpoints(out)} >= {2}
        remove_leftovers(out)
        assert not [name for name in files_of(out) if name.startswith(".")]
        if not killed:
            assert calls > 5, "nothing was interrupted"
            assert [c.step for c in checkpoints(out)] == [2, 3]
            return
    raise AssertionError("it never came to its end")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 4) / "old").write_text("")
    write_checkpoint(staging_directory(tmp_path), 4)
    complete(tmp_path, 4)
    assert files_of(tmp_path / "checkpoint-4") == ["model.safetensors", "optimizer.pt"]


def test_discarding_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    discard(tmp_path / "checkpoint-1")
    assert on_disk.checkpoints(tmp_path) == []


# --- the run's directory ----------------------------------------------------------------------------------------------


def test_two_processes_cannot_train_in_one_directory(tmp_path: Path) -> None:
    with (
        run_directory(tmp_path / "run"),
        pytest.raises(InputError, match="another process is training in"),
        run_directory(tmp_path / "run"),
    ):
        pass


def test_a_directory_in_which_nothing_was_kept_disappears_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_directory(tmp_path / "run"):
        raise RuntimeError
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with run_directory(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_checkpoints_of_another_program_are_not_touched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    with (
        pytest.raises(InputError, match="holds checkpoints of another program; name another --out"),
        run_directory(tmp_path),
    ):
        pass
    assert files_of(tmp_path / "checkpoint-1") == ["model.safetensors", "optimizer.pt"]


def test_restarting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    (tmp_path / "model").mkdir()
    for name in ("run.json", "training_log.jsonl", "result.json", "notes.txt", ".training_log.jsonl.x7"):
        (tmp_path / name).write_text("{}")
    with run_directory(tmp_path):
        forget_run(tmp_path)
        assert files_of(tmp_path) == [".lock", "notes.txt"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where nobody can make a directory")
def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/self/run")):
        with (
            pytest.raises(InputError, match=r"out: cannot write to .*; name a directory that can be written"),
            run_directory(out),
        ):
            pass


# --- the result -------------------------------------------------------------------------------------------------------


def result_of(**changes: Any) -> TrainResult:
    values: dict[str, Any] = {
        "setup": Setup(model="nano").as_dict(), "data": "story", "samples": 48, "steps": 24, "epochs": 3.0, "tokens": 9600, "device": "cpu",
        "first_loss": 9.0, "final_loss": 1 / 3, "final_evaluation_loss": 2.0, "best_evaluation_loss": 1.5, "best_epoch": 2.0,
        "best_checkpoint": "checkpoint-16", "last_checkpoint": "checkpoint-24", "model": "model", "overfit_epoch": 2.0, "training_seconds": 10.0,
        "evaluation_seconds": 1.0, "checkpoint_seconds": None, "peak_phase": "backward",
        "comparisons": (
            PredictedMeasured(quantity="step time", unit="seconds", predicted=Interval(value=2.0, low=1.0, high=3.0), measured=2.5),
            PredictedMeasured(quantity="peak reserved", unit="bytes", predicted=None, measured=None),
        ),
    }  # fmt: skip
    return TrainResult(**(values | changes))


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", result_of())
    assert read_result(tmp_path / "result.json") == result_of()
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["schema"] == "vramcalc/train/1"
    assert set(document) == {"schema", *(field.name for field in dataclasses.fields(TrainResult))}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": "other"}', '{"schema": "vramcalc/train/1"}'])
def test_a_damaged_result_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match=r"result\.json is damaged; write --restart"):
        read_result(tmp_path / "result.json")


def test_the_summary_says_where_overfitting_starts_and_which_checkpoint_to_use(tmp_path: Path) -> None:
    from reports.trained import summary_lines

    said = "\n".join(summary_lines(result_of(), tmp_path))
    assert "OVERFITTING after epoch 2" in said
    assert f"Use {tmp_path / 'checkpoint-16'}." in said
    assert "OVERFITTING" not in "\n".join(summary_lines(result_of(overfit_epoch=None), tmp_path))
