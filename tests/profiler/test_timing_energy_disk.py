"""Step times, energy counters and checkpoint bytes, against numpy and files of known sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import InputError
from profiler.disk import checkpoint_size
from profiler.energy import RaplEnergy, energy_meter
from profiler.timing import StepClock, StepTimes, percentile


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_are_those_of_numpy(values: list[float], fraction: float) -> None:
    assert percentile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)), rel=1e-9)


def test_spread_is_half_of_the_middle_nine_tenths_over_the_median() -> None:
    times = StepTimes(seconds=tuple(float(second) for second in range(1, 22)))  # 1 to 21: 5% is 2, 95% is 20
    assert (times.median_seconds, times.spread) == (11.0, 9 / 11)


def test_a_step_lasts_from_the_end_of_the_last_to_its_own_with_the_device_waited_for() -> None:
    moments = iter([10.0, 12.0, 15.0])
    waits: list[str] = []
    clock = StepClock(lambda: waits.append("waited"), now=lambda: next(moments))
    for _ in range(3):
        clock.tick()
    assert clock.times().seconds == (2.0, 3.0)
    assert waits == ["waited"] * 3


def package(directory: Path, name: str, microjoules: int) -> None:
    path = directory / name
    path.mkdir(exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")


def test_rapl_adds_packages_leaves_out_their_parts_and_survives_a_wrap(tmp_path: Path) -> None:
    package(tmp_path, "intel-rapl:0", 900_000)
    package(tmp_path, "intel-rapl:1", 100_000)
    package(tmp_path, "intel-rapl:0:0", 5)
    meter = energy_meter("cpu", rapl=tmp_path)
    assert isinstance(meter, RaplEnergy)
    before = meter.joules()
    package(tmp_path, "intel-rapl:0", 50_000)  # went past a million
    package(tmp_path, "intel-rapl:1", 300_000)
    assert meter.joules() - before == pytest.approx(0.150 + 0.200)


def test_without_a_readable_counter_there_is_no_meter(tmp_path: Path) -> None:
    assert energy_meter("cpu", rapl=tmp_path / "none") is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert energy_meter("cpu", rapl=tmp_path) is None


def test_checkpoint_bytes_are_split_into_model_optimizer_and_rest(tmp_path: Path) -> None:
    sizes = {
        "model-00001-of-00002.safetensors": 1000,
        "model-00002-of-00002.safetensors": 500,
        "adapter_model.safetensors": 30,
        "optimizer.pt": 4000,
        "scheduler.pt": 7,
        "rng_state.pth": 8,
        "config.json": 9,
    }
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    size = checkpoint_size(tmp_path)
    assert (size.model_bytes, size.optimizer_bytes, size.other_bytes, size.total_bytes) == (1530, 4000, 24, 5554)


def test_a_checkpoint_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory; name the one that training wrote"):
        checkpoint_size(tmp_path / "nothing")
