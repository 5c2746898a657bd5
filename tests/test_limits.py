import os

import pytest

from carflavor import limits
from carflavor.limits import Limits, count_cores, read_limits, read_switch


def test_defaults_stand_where_the_environment_says_nothing(monkeypatch):
    monkeypatch.setenv("CARFLAVOR_MAX_PHOTO_BYTES", "")
    assert read_limits(Limits) == Limits(photo_bytes=16_000_000, photo_pixels=25_000_000, rows=None)


def test_the_environment_names_limits(monkeypatch):
    monkeypatch.setenv("CARFLAVOR_MAX_PHOTO_PIXELS", " 1000 ")
    monkeypatch.setenv("CARFLAVOR_MAX_ROWS", "3")
    assert read_limits(Limits) == Limits(photo_pixels=1000, rows=3)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e6", "²"])
def test_what_is_no_number_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("CARFLAVOR_MAX_ROWS", text)
    with pytest.raises(ValueError) as error:
        read_limits(Limits)
    assert str(error.value) == f"expected CARFLAVOR_MAX_ROWS to be a whole number of at least 1, got {text!r}"


@pytest.mark.parametrize(("text", "value"), [("", True), ("true", True), ("False", False)])
def test_switches(monkeypatch, text, value):
    monkeypatch.setenv("CARFLAVOR_ALLOW_FALLBACK", text)
    assert read_switch("CARFLAVOR_ALLOW_FALLBACK", True) is value


def test_a_switch_is_true_or_false(monkeypatch):
    monkeypatch.setenv("CARFLAVOR_ALLOW_FALLBACK", "yes")
    with pytest.raises(ValueError, match="^expected CARFLAVOR_ALLOW_FALLBACK to be true or false, got 'yes'$"):
        read_switch("CARFLAVOR_ALLOW_FALLBACK", False)


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)]
)
def test_cores_are_those_that_a_container_may_use(monkeypatch, tmp_path, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(limits, "_CPU_QUOTA", tmp_path / "cpu.max")
    assert count_cores() == 8
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert count_cores() == cores
