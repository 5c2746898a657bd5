"""What a served model takes and how much of it, as environment variables say: they reach every way of serving alike."""

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path

_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds a period, and the period


@dataclass(frozen=True)
class Limits:
    """What a model takes, however it is served.

    Attributes:
        photo_bytes: Bytes of one encoded photo.
        photo_pixels: Width times height of one photo, by its header. Decoding takes up to 11 bytes a pixel.
        rows: Photos in one request; None for any number.
    """

    photo_bytes: int = 16_000_000
    photo_pixels: int = 25_000_000
    rows: int | None = None


def read_limits(kind):
    """Returns a dataclass of limits with those that the environment names instead of the defaults.

    Args:
        kind: The dataclass. Its field `photo_bytes` is named by `CARFLAVOR_MAX_PHOTO_BYTES`, and so on.

    Raises:
        ValueError: If one of them is no whole number of at least 1.
    """
    names = {field.name: f"CARFLAVOR_MAX_{field.name.upper()}" for field in fields(kind)}
    return kind(**{field.name: read_number(names[field.name], field.default) for field in fields(kind)})


def read_number(name, default):
    """Returns the environment variable as int of at least 1, or the default where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected {name} to be a whole number of at least 1, got {text!r}")
    return int(text)


def read_switch(name, default):
    """Returns the environment variable as bool, or the default where it is not set or empty."""
    text = os.environ.get(name, "").strip().lower()
    if text not in ("", "true", "false"):
        raise ValueError(f"expected {name} to be true or false, got {text!r}")
    return text == "true" if text else default


def count_cores():
    """Returns the number of cores that this process may use, at least 1."""
    # macOS has no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # What `docker run --cpus` and Kubernetes limit: time, by which a process still sees all cores of the host.
    with contextlib.suppress(OSError, ValueError):
        quota, period = _CPU_QUOTA.read_text().split()
        cores = min(cores, int(quota) // int(period))  # ValueError where the quota is "max"
    return max(cores, 1)
