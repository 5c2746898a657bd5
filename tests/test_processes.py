import functools
import os
import signal
import subprocess
import sys

import pytest

from carflavor.data.processes import map_in_processes

_SCRIPT = """
with open("imports", "a") as file:
    file.write("once ")

from carflavor.data.processes import map_in_processes

if __name__ == "__main__":
    print(sorted(map_in_processes(abs, range(-40, 0), 2)) == list(range(1, 41)))
    import __main__
    print(__main__.__file__)
"""


def test_processes_do_not_import_the_main_module(tmp_path, clean_environment):
    # A step's loads MLflow, matplotlib and more: two seconds for each process.
    (tmp_path / "step.py").write_text(_SCRIPT)
    printed = subprocess.check_output([sys.executable, "step.py"], cwd=tmp_path, env=clean_environment, text=True)
    assert printed.split() == ["True", str(tmp_path / "step.py")]
    assert (tmp_path / "imports").read_text() == "once "


@pytest.mark.parametrize("tasks", [1, 40])
def test_a_process_that_is_killed(tasks):
    kill = functools.partial(_kill_itself, os.getpid())
    with pytest.raises(OSError) as error:
        list(map_in_processes(kill, range(tasks), 4))
    assert str(error.value) == (
        "One of 4 processes was killed, probably for lack of memory: give the same command with fewer workers, "
        "workers=2 say; it goes on where it was"
    )


def _kill_itself(parent, task):
    # As the system does with what has taken too much memory.
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
