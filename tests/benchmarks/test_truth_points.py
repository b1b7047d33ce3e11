"""The truth matrix as devices of several sizes would run it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.truth_points import MATRIX, edge_batches, missing_edges, predicted_bytes, shrunk, truth_points
from estimator.errors import InputError
from estimator.setup import Setup
from profiler.device import LocalDevice

GIB = 2**30


def gpu(name: str, gibibytes: float) -> LocalDevice:
    size = int(gibibytes * GIB)
    return LocalDevice(name=name, kind="cuda", description=name, capacity_bytes=size, free_bytes=size)


CPU = LocalDevice(name="cpu", kind="cpu", description="Some CPU", capacity_bytes=16 * GIB, free_bytes=16 * GIB)
H100 = gpu("H100-SXM-80GB", 79.6)


def test_the_matrix_covers_what_decides_about_memory_and_time() -> None:
    points, left_out = truth_points(H100, tiny=False)
    setups = [point.setup for point in points]
    assert len(setups) == len(set(setups)) > 80
    assert {"bitsandbytes is not installed", "flash_attn is not installed"} >= {row.reason for row in left_out}
    for name, values in {
        "precision": {"fp32", "bf16", "bf16-mixed", "fp16-mixed"},
        "checkpointing": {"none", "full"},
        "attention": {"eager", "sdpa"},
        "attention_kernel": {None, "flash", "math", "cudnn"},
        "optimizer": {"adamw", "adamw-fused", "sgd", "adafactor"},
        "loss": {"standard", "chunked", "fused-linear"},
        "method": {"full", "lora", "dora", "freeze"},
        "compile": {True, False},
        "expandable_segments": {True, False},
        "framework": {"hf-trainer", "torch-loop"},
    }.items():
        assert values <= {getattr(setup, name) for setup in setups}, name
    assert {512, 1024, 2048, 4096, 8192, 16384} <= {setup.seq for setup in setups}
    assert min(setup.batch for setup in setups) == 1 and max(setup.batch for setup in setups) >= 16
    assert 3 <= sum(point.traced for point in points) <= 8


@pytest.mark.parametrize("device", [gpu("RTX-3090", 24), H100], ids=lambda device: device.name)
def test_points_lie_on_both_sides_of_the_memorys_edge_and_none_is_hopeless(device: LocalDevice) -> None:
    points, _ = truth_points(device, tiny=False)
    edges = [predicted_bytes(point.setup) for point in points if point.why == "edge"]
    assert (
        0.7 * device.capacity_bytes < min(edges) <= device.capacity_bytes and max(edges) > 1.04 * device.capacity_bytes
    )
    others = [predicted_bytes(point.setup) for point in points if point.why != "edge"]
    assert len(others) > 50 and max(others) <= 1.1 * device.capacity_bytes


def test_the_batches_at_the_edge_are_the_last_that_fits_and_the_first_that_clearly_does_not() -> None:
    setup = Setup(model="llama-3.2-1b", precision="bf16", seq=2048, accelerator="H100-SXM-80GB")
    size = 40 * GIB
    *fitting, over = edge_batches(setup, size)
    bytes = {batch: predicted_bytes(dataclasses.replace(setup, batch=batch)) for batch in (*fitting, over, over - 1)}
    assert bytes[fitting[-1]] <= size < predicted_bytes(dataclasses.replace(setup, batch=fitting[-1] + 1))
    assert bytes[over - 1] <= 1.04 * size < bytes[over]
    assert edge_batches(setup, 2 * GIB) == []


@pytest.mark.parametrize(
    ("outcomes", "batch"),
    [
        ({50: "ok", 52: "ok", 55: "ok"}, 58),
        ({50: "oom", 52: "oom"}, 47),
        ({1: "oom"}, None),
        ({1: "ok"}, 2),
        ({50: "ok", 52: "oom"}, None),
        ({50: "ok", 52: "failed"}, None),
        ({50: "ok", 52: None}, None),
    ],
    ids=str,
)
def test_an_edge_is_looked_for_until_a_batch_fits_and_a_larger_one_does_not(
    outcomes: dict[int, str | None], batch: int | None
) -> None:
    one = Setup(model="llama-3.2-1b")
    settled = {dataclasses.replace(one, seq=512, batch=n): end for n, end in ((3, "ok"), (4, "oom"))}
    tried = {dataclasses.replace(one, batch=n): end for n, end in outcomes.items()} | settled
    further = missing_edges(list(tried), tried)
    assert further == ([] if batch is None else [dataclasses.replace(one, batch=batch)])


def test_the_tiny_form_keeps_every_setting_that_a_cpu_has() -> None:
    points, left_out = truth_points(CPU, tiny=True)
    assert len(points) > 40 and all(point.setup.accelerator == "cpu" for point in points)
    assert {point.setup.model.removesuffix("-llama") for point in points} == {"nano", "micro", "mini"}
    assert max(point.setup.seq for point in points) <= 256
    quantized = {point.setup.base_quantization for point in points} | {row.setup.base_quantization for row in left_out}
    assert {"nf4", "nf4-dq"} <= quantized  # where bitsandbytes is
    assert "fp16 needs a GPU" in {row.reason for row in left_out}
    small = shrunk(Setup(model="llama-3.1-8b", method="lora", checkpointing="full", seq=4096, batch=8, accumulation=4))
    assert (small.model, small.seq, small.batch, small.accumulation) == ("mini-llama", 256, 2, 4)
    assert (small.method, small.checkpointing) == ("lora", "full")


def test_a_matrix_of_ones_own(tmp_path: Path) -> None:
    header = MATRIX.read_text().splitlines()[0]
    row = dict.fromkeys(header.split(","), "") | {"why": "mine", "model": "gpt2-124m", "seq": "64", "batch": "2"}
    (tmp_path / "mine.csv").write_text(header + "\n" + ",".join(row.values()) + "\n")
    points, left_out = truth_points(CPU, tiny=False, matrix=tmp_path / "mine.csv")
    assert [(p.why, p.setup.model, p.traced) for p in points] == [("mine", "gpt2-124m", False)] and not left_out


def test_a_matrix_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    other, garbled = tmp_path / "other.csv", tmp_path / "garbled.csv"
    other.write_text("model,seq\nmicro,64\n")
    garbled.write_bytes(b"\xff\xfe\n")
    for path, message in (
        (tmp_path / "none.csv", "cannot read"),
        (other, "has no column batch"),
        (garbled, "is not a table"),
    ):
        with pytest.raises(InputError, match=message):
            truth_points(CPU, tiny=True, matrix=path)
