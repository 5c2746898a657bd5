"""Spark sessions; what runs on them is tested where it is written."""

import pytest
from pyspark.sql import SparkSession

from carflavor.spark import check_master, open_session


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
