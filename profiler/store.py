"""The table of measured runs on the disk: CSV or Parquet, and a directory that a sweep adds rows to."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from estimator.errors import InputError, MissingError
from estimator.measured import MEASUREMENTS, MeasuredRun, Skipped, columns, from_row, to_row
from estimator.setup import setting_types
from profiler.files import temporary_prefix, write_whole

TABLE = "measured_runs.parquet"
CSV_TABLE = "measured_runs.csv"
"""The same as text: for tables that are kept under version control, and where pyarrow is not installed."""
_LOCK = ".lock"
_REQUIRED = ("run", "model")


def read_table(path: Path) -> tuple[list[MeasuredRun], list[Skipped]]:
    """Every row that can be read, and each of the others with the reason why it cannot.

    ``path`` is a ``.csv`` (UTF-8), a ``.parquet``, or a directory that holds one (see ``table_of``). Raises InputError for a
    file that is not such a table at all, and MissingError where Parquet needs pyarrow.
    """
    runs, skipped = [], []
    for row in _read_rows(table_of(path)):
        try:
            runs.append(from_row(row))
        except InputError as error:
            label = str(row.get("run") or "?")
            skipped.append(Skipped(run=label, reason=str(error).removeprefix(f"run {label}: ")))
    return runs, skipped


def read_runs(path: Path) -> list[MeasuredRun]:
    """As ``read_table``, where a row that cannot be read is an InputError that names the row and the column."""
    runs, skipped = read_table(path)
    if skipped:
        first = skipped[0]
        more = f" (and {len(skipped) - 1} more rows)" if len(skipped) > 1 else ""
        raise InputError(f"{table_of(path)}: run {first.run}: {first.reason}{more}")
    return runs


def write_runs(path: Path, runs: Iterable[MeasuredRun]) -> None:
    """Writes ``.csv`` or ``.parquet``, whole or not at all. Raises InputError where it cannot be written."""
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"table: {path} is neither .csv nor .parquet; give it one of these endings")
    rows = [to_row(run) for run in runs]
    content = _csv_bytes(rows) if path.suffix == ".csv" else _parquet_bytes(rows)
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"table: cannot write {path}: {error.strerror or error}") from None


class RunStore:
    """The rows of one directory, open for adding by one sweep at a time.

    Raises InputError where the directory cannot be made or written, another sweep has it, or its table holds rows or
    columns that a rewrite would lose. Close it (or use it as a context manager) to let others in.
    """

    def __init__(self, directory: Path, *, table: str = TABLE) -> None:
        self.directory = directory
        self.table = directory / table
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"out: cannot make the directory {directory}: {error.strerror or error}; write another --out"
            ) from None
        self._lock = _lock(directory)
        try:
            for left_by_a_kill in directory.glob(temporary_prefix(self.table) + "*"):
                left_by_a_kill.unlink()
            self._rows: dict[str, MeasuredRun] = {}
            if self.table.exists():
                self._load()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        if unknown := sorted(set(_column_names(self.table)) - set(columns())):
            raise InputError(
                f"{self.table}: holds the column {unknown[0]!r}, which this version would lose; write another --out"
            )
        for run in read_runs(self.table):
            if run.run in self._rows:
                raise InputError(f"{self.table}: run {run.run} is there twice; remove one row or write another --out")
            self._rows[run.run] = run

    @property
    def runs(self) -> tuple[MeasuredRun, ...]:
        """In the order in which they were first added."""
        return tuple(self._rows.values())

    def get(self, run: str) -> MeasuredRun | None:
        return self._rows.get(run)

    def add(self, run: MeasuredRun) -> None:
        """Appends, or replaces the row of the same ``run``; on the disk, complete, when this returns."""
        rows = self._rows | {run.run: run}
        write_runs(self.table, rows.values())
        self._rows = rows

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lock(directory: Path) -> IO[str]:
    """The directory's lock, which the kernel takes back when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:
        raise MissingError("out: a sweep needs file locks, which this system lacks; run it on Linux or macOS") from None
    try:
        lock = (directory / _LOCK).open("w")
    except OSError as error:
        raise InputError(f"out: cannot write in {directory}: {error.strerror or error}; write another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(f"out: another sweep is writing to {directory}; wait for it or write another --out") from None
    return lock


def table_of(path: Path) -> Path:
    """The table that ``path`` means: of a directory, its ``measured_runs.parquet``, or where there is none the CSV."""
    if not path.is_dir():
        return path
    text_alone = (path / CSV_TABLE).exists() and not (path / TABLE).exists()
    return path / (CSV_TABLE if text_alone else TABLE)


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix not in (".csv", ".parquet"):
        raise InputError(f"table: {file} is neither .csv nor .parquet nor a directory that holds {TABLE}")
    try:
        rows = _read_csv(file) if file.suffix == ".csv" else _read_parquet(file)
    except OSError as error:
        raise InputError(f"table: cannot read {file}: {error.strerror or error}") from None
    if not rows:
        raise InputError(f"table: {file} has no rows; give one that `vramcalc profile` wrote")
    _check_columns(file, rows[0])
    return rows


def _check_columns(file: Path, row: Mapping[str, Any]) -> None:
    for name in _REQUIRED:
        if name not in row:
            raise InputError(f"table: {file} has no column {name!r}; give one that `vramcalc profile` wrote")


def _read_csv(file: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    fields = len(reader.fieldnames or ())
                    raise InputError(
                        f"table: {file}, line {reader.line_num}: does not have the header's {fields} columns"
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise InputError(
            f"table: {file} is not UTF-8 text (byte {error.start}); save it as UTF-8, or end it .parquet"
        ) from None
    except csv.Error as error:
        raise InputError(f"table: {file} is not a CSV table: {error}") from None
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    pyarrow, parquet = _arrow()
    with file.open("rb") as stream:
        try:
            return list(parquet.read_table(stream).to_pylist())
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise _not_parquet(file, error) from None


def _column_names(file: Path) -> list[str]:
    if file.suffix == ".csv":
        with file.open(encoding="utf-8-sig", newline="") as text:
            return next(csv.reader(text), [])
    pyarrow, parquet = _arrow()
    with file.open("rb") as stream:
        try:
            return list(parquet.read_schema(stream).names)
        except (pyarrow.ArrowException, OSError) as error:
            raise _not_parquet(file, error) from None


def _not_parquet(file: Path, error: Exception) -> InputError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"table: {file} is not a Parquet table: {first_line}")


def _csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: str(value).lower() if isinstance(value, bool) else value for name, value in row.items()})
    return text.getvalue().encode()


def _parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    pyarrow, parquet = _arrow()
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    kinds = setting_types() | MEASUREMENTS
    schema = pyarrow.schema([(name, types[kinds[name]]) for name in columns()])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingError("table: Parquet needs pyarrow; pip install 'vramcalc-toolkit[store]'") from None
    return pyarrow, pyarrow.parquet
