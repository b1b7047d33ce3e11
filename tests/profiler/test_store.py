"""The table on the disk: what is written is read back, and whatever else is found there is one clear line."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.errors import InputError
from estimator.measured import MeasuredRun, columns, to_row
from estimator.setup import Setup
from profiler.store import CSV_TABLE, TABLE, RunStore, read_runs, read_table, table_of, write_runs

EVIDENCE = Path(__file__).resolve().parents[3] / "shared" / "evidence" / "measured_runs.csv"


def run(name: str = "r1", **values: object) -> MeasuredRun:
    return MeasuredRun(run=name, setup=Setup(model="nano", seq=64), **values)  # type: ignore[arg-type]


FULL = MeasuredRun(
    run="full",
    setup=Setup(model="nano", seq=64, method="lora", lora_targets="q_proj v_proj", compile=True, internode_gbps=1.5),
    source="vramcalc profile: a, comma",
    grade="A+",
    outcome="failed",
    reason='it said "no"\nand more',
    peak_allocated_bytes=2**53 - 1,
    step_seconds=0.1 + 0.2,
    environment='{"a": "ä"}',
)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, ending: str) -> None:
    runs = [FULL, run(), run("r2", outcome="oom", reason="none left")]
    write_runs(tmp_path / f"t{ending}", runs)
    assert read_runs(tmp_path / f"t{ending}") == runs


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**53),
    st.floats(0, allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_any_count_number_and_text_survives_both_formats(
    tmp_path_factory: pytest.TempPathFactory, count: int, number: float, text: str
) -> None:
    directory = tmp_path_factory.mktemp("table")
    original = [run(peak_allocated_bytes=count, step_seconds=number, notes=text)]
    for ending in (".csv", ".parquet"):
        write_runs(directory / f"t{ending}", original)
        assert read_runs(directory / f"t{ending}") == original


def test_columns_have_the_contracts_order_and_bytes_are_whole_numbers(tmp_path: Path) -> None:
    write_runs(tmp_path / "t.csv", [run(peak_allocated_bytes=12_345_678_901)])
    header, row = csv.reader((tmp_path / "t.csv").read_text().splitlines())
    assert header == columns()
    assert row[header.index("peak_allocated_bytes")] == "12345678901"
    write_runs(tmp_path / "t.parquet", [run(peak_allocated_bytes=12_345_678_901), run("r2")])
    frame = pd.read_parquet(tmp_path / "t.parquet", dtype_backend="numpy_nullable")
    assert list(frame.columns) == columns()
    assert str(frame["peak_allocated_bytes"].dtype) == "Int64"


def test_a_table_that_pandas_wrote_is_read(tmp_path: Path) -> None:
    rows = [to_row(run(peak_allocated_bytes=5)), to_row(run("r2"))]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)  # whole numbers become 5.0, True and empty
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    expected = [run(peak_allocated_bytes=5), run("r2")]
    assert read_runs(tmp_path / "t.csv") == expected
    assert read_runs(tmp_path / "t.parquet") == expected


def test_rows_with_values_outside_the_choices_are_reported_and_the_others_read(tmp_path: Path) -> None:
    write_runs(tmp_path / "t.csv", [run(), run("r2")])
    text = (tmp_path / "t.csv").read_text().replace("r2,,,nano,hf-trainer", "r2,,,nano,nanogpt")
    (tmp_path / "t.csv").write_text(text)
    runs, skipped = read_table(tmp_path / "t.csv")
    assert (runs, [skip.run for skip in skipped]) == ([run()], ["r2"])
    assert skipped[0].reason.startswith("framework: 'nanogpt' is not known")
    with pytest.raises(InputError, match=r"t\.csv: run r2: framework: 'nanogpt'"):
        read_runs(tmp_path / "t.csv")


@pytest.mark.parametrize("value", ["1e30", "inf", "-1", "many"])
def test_a_measurement_that_is_no_possible_number_is_reported(value: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"run,model,peak_allocated_bytes\na,nano,{value}\nb,nano,5\n")
    runs, skipped = read_table(tmp_path / "t.csv")
    assert [run.peak_allocated_bytes for run in runs] == [5]
    assert "peak_allocated_bytes" in skipped[0].reason and len(skipped) == 1


@pytest.mark.skipif(not EVIDENCE.exists(), reason="the published measurements are not beside this checkout")
def test_the_published_measurements_are_read_row_by_row() -> None:
    runs, skipped = read_table(EVIDENCE)
    with EVIDENCE.open(newline="", encoding="utf-8") as text:
        assert len(runs) + len(skipped) == len(list(csv.DictReader(text))) == 1128
    assert all(skip.reason and "\n" not in skip.reason for skip in skipped)


HEADER = ",".join(columns()) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "has no rows"),
        ("t.csv", HEADER.encode(), "has no rows"),
        ("t.csv", b"a,b\n1,2\n", "has no column 'run'"),
        ("t.csv", b"run,seq\nr1,2\n", "has no column 'model'"),
        ("t.csv", b"run,model\nr1,nano,extra\n", "line 2: does not have the header's 2 columns"),
        ("t.csv", b"run,model,seq\nr1,nano\n", "line 2: does not have the header's 3 columns"),
        ("t.csv", b"run,model\nr1,\xff\xfe\n", "is not UTF-8 text"),
        ("t.csv", b'run,model\n"r1,nano\n', "is not a CSV table"),
        ("t.csv", b"run,model,seq\nr1,nano,many\n", r"run r1: seq: 'many' is not a whole number"),
        ("t.csv", b"run,model,step_seconds\nr1,nano,-1\n", r"run r1: step_seconds: '-1'"),
        ("t.parquet", b"", "is not a Parquet table"),
        ("t.parquet", b"PAR1 but no more", "is not a Parquet table"),
        ("t.txt", b"x", "is neither .csv nor .parquet"),
    ],
)
def test_a_broken_table_is_one_line_that_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_runs(tmp_path / name)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_a_table_that_is_cut_off_anywhere_is_never_a_crash(tmp_path: Path) -> None:
    write_runs(tmp_path / "t.parquet", [run(), FULL])
    whole = (tmp_path / "t.parquet").read_bytes()
    for length in range(0, len(whole), max(len(whole) // 60, 1)):
        (tmp_path / "cut.parquet").write_bytes(whole[:length])
        with pytest.raises(InputError, match="is not a Parquet table"):
            read_runs(tmp_path / "cut.parquet")


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none.csv: No such file"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"measured_runs.parquet: No such file"):
        read_runs(tmp_path)  # a directory without a table


def test_a_directory_means_its_table(tmp_path: Path) -> None:
    write_runs(tmp_path / TABLE, [run()])
    assert read_runs(tmp_path) == [run()]


def test_a_table_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_runs(tmp_path / "missing" / "t.csv", [run()])
    with pytest.raises(InputError, match=r"is neither .csv nor .parquet"):
        write_runs(tmp_path / "t.json", [run()])
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_runs(tmp_path / "t.csv", [run()])
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_an_added_row_is_on_the_disk_and_a_row_of_the_same_run_is_replaced(tmp_path: Path) -> None:
    with RunStore(tmp_path / "new" / "sweep") as store:
        store.add(run())
        assert read_runs(tmp_path / "new" / "sweep") == [run()]
        store.add(run("r2"))
        store.add(run(outcome="oom"))
        assert store.get("r1") == run(outcome="oom")
    assert read_runs(tmp_path / "new" / "sweep") == [run(outcome="oom"), run("r2")]


def test_a_second_sweep_on_the_same_directory_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with RunStore(tmp_path), pytest.raises(InputError, match="another sweep is writing to"):
        RunStore(tmp_path)
    with RunStore(tmp_path) as store:
        assert store.runs == ()


def test_a_store_refuses_a_table_of_which_it_would_lose_something(tmp_path: Path) -> None:
    write_runs(tmp_path / TABLE, [run()])
    frame = pd.read_parquet(tmp_path / TABLE)
    for changed, message in (
        (frame.assign(mine=1), "holds the column 'mine'"),
        (frame.assign(framework="nanogpt"), "run r1: framework"),
        (pd.concat([frame, frame]), "run r1 is there twice"),
    ):
        changed.to_parquet(tmp_path / TABLE, index=False)
        before = (tmp_path / TABLE).read_bytes()
        for _ in range(2):  # the refusal lets go of the lock
            with pytest.raises(InputError, match=message):
                RunStore(tmp_path)
        assert (tmp_path / TABLE).read_bytes() == before


def test_a_store_clears_what_a_killed_write_left(tmp_path: Path) -> None:
    (tmp_path / f".{TABLE}.abc").write_text("half")
    with RunStore(tmp_path):
        assert not (tmp_path / f".{TABLE}.abc").exists()


def test_a_store_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the directory"):
        RunStore(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write in"):
        RunStore(Path("/proc"))


def test_a_store_of_text_grows_is_found_by_its_directory_and_loses_nothing(tmp_path: Path) -> None:
    with RunStore(tmp_path, table=CSV_TABLE) as store:
        store.add(FULL)
    with RunStore(tmp_path, table=CSV_TABLE) as store:
        assert store.runs == (FULL,)
        store.add(run())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", CSV_TABLE]
    assert (table_of(tmp_path), read_runs(tmp_path)) == (tmp_path / CSV_TABLE, [FULL, run()])
    (tmp_path / CSV_TABLE).write_text("run,model,mine\nr1,nano,x\n")
    with pytest.raises(InputError, match="'mine', which this version would lose"):
        RunStore(tmp_path, table=CSV_TABLE)
    write_runs(tmp_path / TABLE, [run("other")])
    assert [one.run for one in read_runs(tmp_path)] == ["other"], "a sweep's own table comes first"
