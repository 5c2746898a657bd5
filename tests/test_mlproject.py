"""MLproject, conda.yaml, setup.cfg, the commands and the steps' dataclasses say the same."""

import configparser
import dataclasses
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from click.testing import CliRunner
from mlflow.projects import _project_spec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MLPROJECT = yaml.safe_load((ROOT / "MLproject").read_text())
ENTRY_POINTS = MLPROJECT["entry_points"]
# How a field of a dataclass is declared in MLproject. `path` and `uri` are not ours: the first must exist, the second
# refuses plain paths. A bool is a text there, for YAML's `true` would reach MLflow's records as `True`.
DECLARED_TYPES = {str: "string", bool: "string", int: "int", float: "float"}
DECLARED_TYPES |= {int | str: "string", float | str: "string"}  # a number, or auto
YAML_TYPES = {"string": str, "int": int, "float": float}

each_entry_point = pytest.mark.parametrize("name", ENTRY_POINTS)


def load(name):
    """Returns an entry point's click command and its dataclass, the only one that the file imports."""
    namespace = runpy.run_path(str(ROOT / "entrypoints" / f"{name}.py"))
    (config,) = (value for value in namespace.values() if isinstance(value, type) and dataclasses.is_dataclass(value))
    return namespace["main"], config


def parameters(name):
    return ENTRY_POINTS[name].get("parameters", {})


def test_every_file_is_an_entry_point():
    assert sorted(path.name for path in (ROOT / "entrypoints").glob("*.py")) == sorted(
        f"{name}.py" for name in ENTRY_POINTS
    )


def test_the_environment_is_conda_yaml():
    # MLflow refuses `python_env` beside it, and takes any other key as a wish it does not know.
    assert MLPROJECT.keys() == {"name", "conda_env", "entry_points"}
    assert MLPROJECT["conda_env"] == "conda.yaml"


@each_entry_point
def test_command_passes_every_parameter_once(name):
    # MLflow drops a declared parameter that the command does not pass, without a word.
    words = ENTRY_POINTS[name]["command"].split()
    assert words[:4] == ["PYTHONPATH=.", "exec", "python", f"entrypoints/{name}.py"]
    assert sorted(zip(words[4::2], words[5::2], strict=True)) == sorted(
        ("--" + parameter.replace("_", "-"), "{" + parameter + "}") for parameter in parameters(name)
    )


@each_entry_point
def test_names_are_the_same_on_all_sides(name):
    command, config = load(name)
    assert [type(option) for option in command.params] == [click.Option] * len(command.params)
    assert {option.name: (option.opts, option.secondary_opts) for option in command.params} == {
        parameter: (["--" + parameter.replace("_", "-")], []) for parameter in parameters(name)
    }
    assert [field.name for field in dataclasses.fields(config)] == list(parameters(name))
    assert config.__dataclass_params__.frozen


@each_entry_point
def test_types_and_defaults_are_the_same_on_all_sides(name):
    command, config = load(name)
    context = click.Context(command)
    options = {option.name: option for option in command.params}
    for field in dataclasses.fields(config):
        declared, option = parameters(name)[field.name], options[field.name]
        assert declared["type"] == DECLARED_TYPES[field.type], field.name
        assert declared.keys() <= {"type", "default"}, field.name
        required = field.default is dataclasses.MISSING
        assert ("default" not in declared, option.required) == (required, required), field.name
        # MLflow gives every parameter exactly one value.
        assert not option.is_flag and option.nargs == 1 and not option.multiple, field.name
        if required:
            continue
        # YAML reads 1e-4 as a text, and 1 as an int.
        assert type(declared["default"]) is YAML_TYPES[declared["type"]], field.name
        for default in (option.type_cast_value(context, str(declared["default"])), option.default, field.default):
            assert type(default) in (get_args(field.type) or (field.type,)), field.name
            assert default == field.default, field.name


@each_entry_point
def test_what_mlflow_runs_arrives_in_the_dataclass(name):
    command, config = load(name)
    required = {
        field.name: f'runs:/1a/{field.name} that isn\'t "$HOME"'
        for field in dataclasses.fields(config)
        if field.default is dataclasses.MISSING
    }
    entry_point = _project_spec.load_project(str(ROOT)).get_entry_point(name)
    line = entry_point.compute_command(required, storage_dir=None)
    arrived = []

    def arrive(**options):
        arrived.append(config(**options))
        raise click.Abort

    namespace = command.callback.__globals__
    (config_name,) = (key for key, value in namespace.items() if value is config)
    namespace[config_name] = arrive
    result = CliRunner().invoke(command, shlex.split(line)[4:])
    assert (arrived, result.output) == ([config(**required)], "Aborted!\n")


def test_a_step_that_went_well_returns(monkeypatch, capsys):
    """As IPython runs it in a job, where SystemExit is a failure."""
    monkeypatch.setattr(sys, "argv", ["promote.py", "--help"])
    runpy.run_path(str(ROOT / "entrypoints" / "promote.py"), run_name="__main__")
    assert "--challenger" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["promote.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "entrypoints" / "promote.py"), run_name="__main__")
    assert end.value.code == 2


@pytest.mark.parametrize("name", ["carflavor.command", "carflavor.server"])
def test_mlflow_does_not_report_what_a_step_calls(name, clean_environment, tmp_path):
    # It reports neither from tests nor from CI, so nothing may look like these.
    environment = {name: clean_environment[name] for name in ("PATH", "TF_CPP_MIN_LOG_LEVEL")}
    code = f"import {name}, mlflow; print(mlflow.telemetry.get_telemetry_client())"
    for variables, expected in (({}, "None\n"), ({"MLFLOW_DISABLE_TELEMETRY": "false"}, "<mlflow.telemetry.client.")):
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **variables, "HOME": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.stdout.startswith(expected), process.stderr


def setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def requirements(*lists):
    """Returns the requirements of some lists in setup.cfg by name."""
    by_name = {}
    for line in filter(None, "\n".join(lists).splitlines()):
        requirement = Requirement(line)
        by_name.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return by_name


def pins():
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    return [Requirement(line) for line in environment["dependencies"][-1]["pip"]]


def test_everything_but_python_and_pip_stands_under_pip():
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert environment.keys() == {"name", "channels", "dependencies"}
    python, pip, under_pip = environment["dependencies"]
    # `--env-manager uv` and virtualenv drop what stands beside them. A patch version would have to be found exactly.
    assert (python, pip, list(under_pip)) == ("python=3.11", "pip", ["pip"])


def test_setup_cfg_allows_the_python_of_conda_yaml():
    assert SpecifierSet(setup_cfg()["options"]["python_requires"]).contains("3.11")


def test_conda_yaml_pins_exactly_and_once():
    names = [canonicalize_name(pin.name) for pin in pins()]
    assert sorted(names) == sorted(set(names))
    for pin in pins():
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(pin)
        assert (pin.url, pin.marker, pin.extras) == (None, None, set()), str(pin)


def test_pins_lie_in_the_ranges_of_setup_cfg():
    setup = setup_cfg()
    needed = requirements(setup["options"]["install_requires"])
    named = requirements(setup["options"]["install_requires"], *setup["options.extras_require"].values())
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins()}
    assert needed.keys() - pinned.keys() == set()
    assert pinned.keys() - named.keys() == set()
    for name, version in pinned.items():
        for requirement in named[name]:
            assert requirement.specifier.contains(version, prereleases=True), f"{name}=={version}, {requirement}"
