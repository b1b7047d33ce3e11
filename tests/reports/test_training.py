import json
from pathlib import Path

import pytest

from estimator.errors import InputError
from estimator.units import Interval
from harness.train_result import PredictedMeasured, TrainResult, write_result
from harness.training_log import LogEntry, TrainingLog
from reports.comparison import Comparison
from reports.training import RESULT_FILE, parse_training, read_training


def line(step: int, kind: str, loss: float) -> str:
    return json.dumps({"step": step, "epoch": step / 2, "kind": kind, "loss": loss, "seconds": 0.1}) + "\n"


LOG = "".join(
    line(step, kind, loss)
    for step, kind, loss in (
        (1, "train", 5.0),
        (2, "train", 4.0),
        (2, "eval", 4.1),
        (3, "train", 3.0),
        (4, "train", 2.5),
        (4, "eval", 4.6),
    )
)
RESULT = json.dumps(
    {
        "comparisons": [
            {
                "quantity": "step time",
                "unit": "seconds",
                "predicted": {"value": 1.0, "low": 0.9, "high": 1.2},
                "measured": 1.1,
            },
            {"quantity": "peak reserved", "unit": "bytes", "predicted": None, "measured": None},
        ]
    }
)


def test_losses_and_the_start_of_overfitting_are_read() -> None:
    training = parse_training(LOG, None, name="run")
    assert [point.loss for point in training.train] == [5.0, 4.0, 3.0, 2.5]
    assert [point.epoch for point in training.evaluation] == [1.0, 2.0]
    assert training.best == training.evaluation[0]
    assert training.overfit_epoch == 1.0


def test_predicted_against_measured_is_read_from_the_result() -> None:
    assert parse_training(LOG, RESULT, name="run").comparisons == (
        Comparison(quantity="step time", unit="seconds", predicted=1.0, low=0.9, high=1.2, measured=1.1),
        Comparison(quantity="peak reserved", unit="bytes", predicted=None, low=None, high=None, measured=None),
    )


def test_a_line_that_is_still_being_written_is_left_out() -> None:
    assert len(parse_training(LOG + '{"step": 5, "ep', None, name="run").train) == 4


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("", "holds no losses"),
        ("hello\n", "line 1: not JSON"),
        ("[]\n", "line 1: not a JSON object"),
        (line(1, "train", 1.0) + line(2, "test", 1.0), "line 2: kind is 'test'"),
        (line(1, "train", float("nan")), "line 1: loss is nan, not a number"),
        ('{"kind": "train", "step": 1, "epoch": 1, "loss": 1' + 400 * "0" + "}\n", "not a number"),
        (line(1, "train", 1.0).replace("1.0", '"<script>"'), "line 1: loss is '<script>', not a number"),
        ('{"kind": "train", "step": true, "epoch": 1, "loss": 1}\n', "line 1: step is True, not a number"),
    ],
)
def test_a_damaged_log_is_one_line_that_says_where(log: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_training(log, None, name="run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{", "not JSON"),
        ("{}", "comparisons is not a list"),
        ('{"comparisons": [1]}', "comparisons is not a list of objects"),
        ('{"comparisons": [{"predicted": 3}]}', "predicted is 3, not an object"),
        ('{"comparisons": [{"predicted": {"value": "x"}}]}', "predicted.value is 'x', not a number"),
    ],
)
def test_a_damaged_result_is_one_line_that_says_what(result: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_training(LOG, result, name="run")
    assert str(caught.value).startswith("training: run/result.json: ")
    assert message in str(caught.value)


def test_a_training_that_still_runs_has_no_result(tmp_path: Path) -> None:
    (tmp_path / "training_log.jsonl").write_text(LOG)
    training = read_training(tmp_path)
    assert training.comparisons == ()
    assert len(training.train) == 4


def test_a_directory_without_a_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training: cannot read .*training_log\.jsonl: No such file"):
        read_training(tmp_path)


def test_a_log_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "training_log.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_training(tmp_path)


def test_what_a_training_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, resumed_step=0)
    for step, kind, loss in ((1, "train", 4.0), (1, "eval", 3.9), (2, "train", 3.0)):
        log.append(LogEntry(step=step, epoch=float(step), kind=kind, loss=loss, seconds=0.5))
    log.close()
    result = TrainResult(
        setup={}, data="d", samples=1, steps=2, epochs=2.0, tokens=128, device="cpu", first_loss=4.0, final_loss=3.0,
        final_evaluation_loss=3.9, best_evaluation_loss=3.9, best_epoch=1.0, best_checkpoint="c", last_checkpoint="c",
        model="m", overfit_epoch=None, training_seconds=1.0, evaluation_seconds=0.5, checkpoint_seconds=None,
        peak_phase=None,
        comparisons=(
            PredictedMeasured(
                quantity="duration", unit="hours", predicted=Interval(value=2.0, low=1.0, high=3.0), measured=2.5
            ),
        ),
    )  # fmt: skip
    write_result(tmp_path / RESULT_FILE, result)
    training = read_training(tmp_path)
    assert [point.loss for point in training.train] == [4.0, 3.0]
    assert training.comparisons == (
        Comparison(quantity="duration", unit="hours", predicted=2.0, low=1.0, high=3.0, measured=2.5),
    )
