import subprocess
import sys

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
