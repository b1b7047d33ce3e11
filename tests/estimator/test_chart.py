"""The chart: which cells it has, that each is the estimate of its setup, and how the published one compares."""

from __future__ import annotations

import pytest

from estimator.chart import DEFAULT_MODELS, make_chart
from estimator.errors import InputError
from estimator.estimate import estimate
from estimator.model.catalog import read_data
from estimator.published_chart import editions, published_chart
from estimator.setup import Setup


def labels(**axes: list[object]) -> list[str]:
    return [row.label for row in make_chart({"model": ["nano"], **axes}).rows]


def test_without_flags_it_is_the_usual_methods_at_512_tokens_over_eight_models() -> None:
    chart = make_chart({})
    assert tuple(column.model for column in chart.columns) == DEFAULT_MODELS
    assert [row.label for row in chart.rows] == [
        "full bf16-mixed", "full bf16", "freeze (2 layers) bf16", "lora bf16", "qlora int8", "qlora nf4-dq",
    ]  # fmt: skip
    assert "512 tokens" in chart.assumptions and "batch 1" in chart.assumptions
    assert 463e6 < chart.columns[0].parameters < 465e6 and 405e9 < chart.columns[-1].parameters < 406e9


def test_every_cell_is_the_estimate_of_its_setup() -> None:
    chart = make_chart({"model": ["llama-3.1-8b", "1e9"], "method": ["lora"], "seq": [512, 2048]})
    cell = chart.rows[1].cells[0]
    setup = Setup(model="llama-3.1-8b", method="lora", precision="bf16", seq=2048)
    assert cell.setup == setup.resolved()
    assert cell.peak_device_bytes == estimate(setup).memory.peak_device_bytes


def test_lists_cross_and_a_setting_that_a_method_lacks_makes_no_second_line() -> None:
    assert labels(method=["full", "qlora"], base_quantization=["nf4", "int8"], precision=["bf16"]) == [
        "full bf16", "qlora nf4", "qlora int8",
    ]  # fmt: skip
    assert labels(method=["lora"], lora_rank=[8, 64]) == ["lora bf16, lora rank 8", "lora bf16, lora rank 64"]
    assert labels(method=["full"], precision=["fp32"], seq=[512, 4096], batch=[1, 2]) == [
        f"full fp32, {seq} tokens, batch {batch}" for seq in ("512", "4,096") for batch in (1, 2)
    ]
    assert labels(method=["dora"]) == ["dora bf16"]


def test_a_chart_larger_than_anybody_reads_is_refused() -> None:
    with pytest.raises(InputError, match="shorter lists"):
        make_chart({"model": ["nano"] * 100, "seq": list(range(1, 101))})


def test_memory_grows_with_the_model_and_never_falls_with_the_tokens() -> None:
    chart = make_chart({"model": ["1e9", "8e9", "70e9"], "seq": [512, 4096]})
    for row in chart.rows:
        sizes = [cell.peak_device_bytes.value for cell in row.cells]
        assert sizes == sorted(sizes)
    for short, long in zip(chart.rows[::2], chart.rows[1::2], strict=True):
        assert all(
            a.peak_device_bytes.value <= b.peak_device_bytes.value for a, b in zip(short.cells, long.cells, strict=True)
        )


@pytest.mark.parametrize("edition", editions())
def test_every_published_value_stands_beside_ours_or_says_why_not(edition: str) -> None:
    cells = published_chart(edition)
    rows = [row for row in read_data("published_chart.csv") if row["edition"] == edition]
    assert len(cells) == len(rows) and all(cell.source and cell.why for cell in cells)
    for cell in cells:
        assert (cell.ours is None) == (cell.method == "QLoRA 2")
        if cell.ours is not None:
            assert cell.ratio == pytest.approx(cell.published_bytes / cell.ours.peak_device_bytes.value)
            assert cell.why.startswith(f"{cell.published_bytes / cell.parameters:.1f} B a parameter; ours ")


def test_the_storys_chart_is_there_and_the_states_alone_explain_most_of_full_fine_tunes() -> None:
    story = {cell.size: cell for cell in published_chart("2024-01") if cell.method == "Full 16"}
    assert [story[size].published_bytes // 10**9 for size in ("7B", "13B", "30B")] == [160, 320, 600]
    # fp32 weights, gradients and two moments: 16 B a parameter, which is what both charts mostly are.
    for cell in published_chart("2024-07"):
        if cell.method == "Full AMP":
            assert 16 < cell.published_bytes / cell.parameters < 20
            assert "4 weights + 4 gradients + 8 optimizer" in cell.why


def test_settings_move_ours_and_not_the_published_values() -> None:
    short, long = published_chart(None, {"seq": 512}), published_chart(None, {"seq": 8192, "batch": 4})
    for before, after in zip(short, long, strict=True):
        assert before.published_bytes == after.published_bytes
        if before.ours is not None and after.ours is not None:
            assert after.ours.peak_device_bytes.value > before.ours.peak_device_bytes.value
    with pytest.raises(InputError, match="2024-07"):
        published_chart("1999-01")


def test_the_charts_models_have_the_sizes_that_they_stand_for() -> None:
    # Published totals: LLaMA 32.5B and Pythia-1B 1,011,781,632 (their papers), Qwen1.5-110B 111B (its card).
    sizes = {cell.model: cell.parameters for cell in published_chart("2024-07")}
    assert sizes["llama-33b"] == pytest.approx(32.5e9, rel=0.002)
    assert sizes["qwen1.5-110b"] == pytest.approx(111e9, rel=0.005)
    assert estimate(Setup(model="pythia-1b")).model.parameters == 1_011_781_632
