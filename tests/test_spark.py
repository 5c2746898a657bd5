"""Spark sessions; what runs on them is tested where it is written."""

import os

import pytest
from pyspark.sql import SparkSession

from carflavor.spark import _leave_token, check_master, open_session


@pytest.mark.parametrize("master", ["", "local", "local[2]", "local[*]", "spark://head:7077", "yarn", "session"])
def test_masters(master):
    check_master(master)


@pytest.mark.parametrize("master", ["head:7077", "yarn-client", "local[2", "Session", "spark://"])
def test_masters_that_are_none(master):
    with pytest.raises(ValueError, match=r"Expected master to be local\[n\], spark://.*Received: master='"):
        check_master(master)


def test_session_that_is_there_is_used_and_left_open():
    with open_session("local[1]", "outer") as outer:
        with open_session("spark://nowhere:7077", "inner") as inner:
            assert inner is outer
        assert outer.range(3).count() == 3
    assert SparkSession.getActiveSession() is None


def test_a_volume_takes_predictions_and_no_record_files(tmp_path, monkeypatch):
    def write_in_order(descriptor, data, offset):
        if offset != os.fstat(descriptor).st_size:
            raise OSError(95, os.strerror(95))
        return os.write(descriptor, data)

    (tmp_path / "here").touch()
    monkeypatch.setattr(os, "pwrite", write_in_order)
    assert _leave_token(str(tmp_path), in_order=True)[1] is None
    assert _leave_token(str(tmp_path), in_order=False)[1] == "it cannot write there: Operation not supported"
