"""A short form of the soak: what takes half an hour in earnest is here half a minute."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_no_good_request_fails_and_none_is_lost(openvino_model, clean_environment, tmp_path):
    command = [sys.executable, BENCHMARKS / "soak.py", "--model", openvino_model, "--minutes", "0.5", "--clients", "16"]
    process = subprocess.run(command, cwd=tmp_path, env=clean_environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout.splitlines()[-1])
    assert (figures["good_errors"], figures["bad_wrong"], figures["lost"], figures["exit_code"]) == (0, 0, 0, 0)
    assert sum(count for kind, count in figures["answers"].items() if kind.startswith("good 200")) > 500
    assert sum(count for kind, count in figures["answers"].items() if kind.startswith("bad 400")) > 100
