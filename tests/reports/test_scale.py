import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.units import GIB, Interval
from reports import scale


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (8_519_680, "8.12 MiB"),  # the cuBLAS workspace on Ampere
        (24 * GIB, "24.0 GiB"),
        (38_400 * GIB, "38,400 GiB"),  # memory stays in GiB, as the story's figure does
    ],
)
def test_memory_is_written_in_binary_units(amount: float, text: str) -> None:
    assert scale.memory_text(amount) == text


def test_what_is_left_of_a_memory_is_a_phrase() -> None:
    assert scale.margin_text(2**30, fits=True) == "1.00 GiB to spare"
    assert scale.margin_text(-(2**30), fits=False) == "1.00 GiB too much"
    assert scale.margin_text(0, fits=True) == "with nothing to spare"


def test_a_rate_beyond_all_numbers_is_written_as_that() -> None:
    assert scale.digits(float("inf")) == "inf"


def test_disk_space_is_written_in_decimal_units() -> None:
    assert scale.disk_text(5_570_000_000) == "5.57 GB"
    assert scale.disk_text(550e9) == "550 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00034, "340 us"),
        (0.34, "340 ms"),
        (90, "90.0 s"),
        (2700, "45.0 min"),
        (36 * 3600, "36.0 h"),
        (5 * 86400, "5.00 days"),
        (32_106 * 365.25 * 86400, "32,106 years"),
    ],
)
def test_durations_are_written_in_the_unit_that_people_would_choose(seconds: float, text: str) -> None:
    assert scale.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(5, "5"), (999, "999"), (494_032_768, "494M"), (8_030_261_248, "8.03B"), (3e12, "3T")]
)
def test_counts_are_written_as_the_field_names_models(count: float, text: str) -> None:
    assert scale.count_text(count) == text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.042, "$0.042"), (12.3, "$12.30"), (999.996, "$1,000"), (1234.4, "$1,234"), (1.25e6, "$1.25M")],
)
def test_dollars_are_written_with_as_many_digits_as_matter(dollars: float, text: str) -> None:
    assert scale.dollars_text(dollars) == text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0%"), (1e-6, "<0.01%"), (0.0012, "0.12%"), (0.042, "4.2%"), (0.38, "38%")]
)
def test_small_percentages_keep_their_digits(fraction: float, text: str) -> None:
    assert scale.percent_text(fraction) == text


def test_an_error_says_which_way_it_goes_unless_it_rounds_to_nothing() -> None:
    texts = [scale.percent_text(error, sign=True) for error in (0.042, -0.042, -1e-6, 0.0)]
    assert texts == ["+4.2%", "-4.2%", "0.00%", "0%"]


def test_an_interval_names_a_shared_unit_once() -> None:
    interval = Interval(value=100 * GIB, low=90 * GIB, high=120 * GIB)
    assert scale.interval_text(interval, "bytes") == "100 GiB (90.0 to 120 GiB)"


def test_an_exact_value_has_no_interval() -> None:
    assert scale.interval_text(Interval.exactly(3.0), "seconds") == "3.00 s"


def test_an_interval_across_two_units_names_both() -> None:
    assert scale.range_text(0.5 * GIB, 2 * GIB, "bytes") == "512 MiB to 2.00 GiB"


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_three_digits_are_never_more_than_half_a_percent_off(value: float) -> None:
    assert float(scale.digits(value).replace(",", "")) == pytest.approx(value, rel=0.00501)


@given(st.floats(min_value=0, max_value=1e30))
def test_every_unit_can_be_written_in_ascii(value: float) -> None:
    for unit in ("bytes", "disk_bytes", "seconds", "tokens/s", "hours", "usd", "kwh", "fraction", "count", "furlongs"):
        assert scale.value_text(value, unit).isascii()
