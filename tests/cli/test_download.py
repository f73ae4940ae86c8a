"""`qtool download` through both hubs' real clients, against hubs on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hub.fixtures import TOKEN, Hub, contents, model_files, wanted
from tests.hub.loopback import FOREVER, Fault, Repo

SHARD = "model-00001-of-00002.safetensors"


def partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


# ---------------------------------------------------------------- what it delivers


def test_the_folder_has_the_repository_and_a_lock(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    done = hub.download("org/model", cwd=tmp_path)
    folder = tmp_path / "model"
    assert (done.code, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert contents(folder) == wanted(model_repo)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    lock = json.loads((folder / "qtool.lock.json").read_text())
    assert (lock["hub"], lock["repo"], lock["revision"]) == (hub.name, "org/model", "main")
    assert lock["commit"] == hub.server.repos["org/model"].commit
    assert lock["endpoint"] == hub.server.url
    assert lock["files"] == {
        path: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in wanted(model_repo).items()
    }


def test_a_second_time_downloads_nothing(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    assert hub.download("org/model", cwd=tmp_path).code == 0
    fetched = len(hub.server.sent("/storage/") + hub.server.behind.sent("/storage/"))  # type: ignore[attr-defined]
    done = hub.download("org/model", cwd=tmp_path)
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'model'}\n")
    assert len(hub.server.sent("/storage/") + hub.server.behind.sent("/storage/")) == fetched  # type: ignore[attr-defined]


def test_json_and_a_place_of_ones_own(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "here"
    done = hub.download("org/model", "--to", target, "--json", "--quiet", cwd=tmp_path)
    assert (done.code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["path"] == str(target)
    assert result["bytes"] == sum(map(len, wanted(model_repo).values()))
    assert contents(target) == wanted(model_repo)


def test_dry_run_shows_and_touches_nothing(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    done = hub.download("org/model", "--dry-run", "--json", cwd=tmp_path)
    assert done.code == 0
    result = json.loads(done.stdout)
    assert result["files"] == {path: len(data) for path, data in wanted(model_repo).items()}
    assert "pytorch_model.bin" in done.stderr
    assert not list(tmp_path.iterdir())


def test_include_and_exclude(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    patterns = ["--include", "*.json", "--include", "pytorch_model.bin", "--exclude", "additional/"]
    done = hub.download("org/model", *patterns, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert set(contents(tmp_path / "model")) == {"config.json", "model.safetensors.index.json", "pytorch_model.bin"}


def test_a_revision_is_pinned_to_its_commit(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    older = model_files(seed=1)
    hub.server.repos["org/model"].revisions["v1"] = older
    commit = hashlib.sha1(b"v1").hexdigest()
    for revision in ("v1", commit):
        done = hub.download("org/model", "--revision", revision, "--to", revision, cwd=tmp_path)
        assert done.code == 0, done.stderr
        assert contents(tmp_path / revision) == wanted(older)
        assert json.loads((tmp_path / revision / "qtool.lock.json").read_text())["commit"] == commit


def test_a_recipe_knows_where_its_model_is(modelers: Hub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "quant-model-00001-of-00001.safetensors": model_files()[SHARD]}
    modelers.server.repos["MindSpore-Lab/DeepSeek-R1-W8A8"] = Repo(files)
    done = modelers.run("download", "deepseek-r1-w8a8", cwd=tmp_path, env=modelers.env)
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'DeepSeek-R1-W8A8'}\n"), done.stderr
    assert contents(tmp_path / "DeepSeek-R1-W8A8") == files


@pytest.mark.parametrize(
    ("recipe", "repo"),
    [
        ("deepseek-r1-0528-w8a8", "DeepSeek-R1-0528-A8W8"),
        ("deepseek-r1-0528-w8a8-fa3", "DeepSeek-R1-0528-A8W8FA3"),
        ("deepseek-r1-0528-w4a8", "R1-0528-A8W4"),
        ("qwen3-32b-w8a8", "Qwen3-32B-gs-A8W8"),
    ],
)
def test_the_models_that_guides_name(modelers: Hub, tmp_path: Path, recipe: str, repo: str) -> None:
    modelers.server.repos[f"MindSpore-Lab/{repo}"] = Repo({"config.json": b"{}"})
    done = modelers.run("download", recipe, cwd=tmp_path, env=modelers.env)
    assert (done.code, done.stdout) == (0, f"{tmp_path / repo}\n"), done.stderr


def test_another_name_where_the_first_is_gone(modelers: Hub, tmp_path: Path) -> None:
    def run(*args: str) -> Any:
        return modelers.run("download", "deepseek-r1-0528-w8a8", *args, cwd=tmp_path, env=modelers.env)

    done = run()
    said = one_to_three_lines(done)
    assert "no such repository" in said
    assert "nor is the model there as MindSpore-Lab/DeepSeek-R1-0528-gs-A8W8" in said
    modelers.server.repos["MindSpore-Lab/DeepSeek-R1-0528-gs-A8W8"] = Repo({"config.json": b"{}"})
    done = run()
    folder = tmp_path / "DeepSeek-R1-0528-A8W8"  # the folder that the recipe's name stands for
    assert (done.code, done.stdout) == (0, f"{folder}\n"), done.stderr
    assert "of its other names there is MindSpore-Lab/DeepSeek-R1-0528-gs-A8W8" in done.stderr
    lock = json.loads((folder / "qtool.lock.json").read_text())
    assert lock["repo"] == "MindSpore-Lab/DeepSeek-R1-0528-gs-A8W8"  # what it really is
    assert run("--offline").stdout == f"{folder}\n"


def test_auto_asks_hugging_face_then_modelers(huggingface: Hub, modelers: Hub, tmp_path: Path) -> None:
    env = huggingface.env | modelers.env | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    huggingface.server.repos["org/both"] = Repo({"config.json": b'{"hub": 1}'})
    for name in ("both", "there"):
        modelers.server.repos[f"org/{name}"] = Repo({"config.json": b'{"hub": 2}'})
    for name, content in (("both", b'{"hub": 1}'), ("there", b'{"hub": 2}')):
        done = modelers.run("download", f"org/{name}", cwd=tmp_path, env=env)
        assert done.code == 0, done.stderr
        assert contents(tmp_path / name) == {"config.json": content}
    done = modelers.run("download", "org/nowhere", cwd=tmp_path, env=env)
    assert done.code == 2
    assert "no such repository on Hugging Face" in done.stderr
    assert "no such repository on modelers.cn" in done.stderr


# ---------------------------------------------------------------- no access


def one_to_three_lines(done: Any) -> str:
    assert (done.code, done.stdout) == (2, ""), done.stderr
    _, _, error = done.stderr.rpartition("error: ")
    assert len(error.splitlines()) <= 3, done.stderr
    return str(error)


def test_each_reason_for_no_access_has_its_own_words(hub: Hub, tmp_path: Path) -> None:
    hub.server.repos["org/gated"] = Repo({"config.json": b"{}"}, gated=True)
    hub.server.repos["org/private"] = Repo({"config.json": b"{}"}, private=True)
    hub.server.repos["org/open"] = Repo({"config.json": b"{}"})
    variable = next(iter(hub.token))
    bad = {variable: "not-a-good-one"}
    messages = {
        "no such repository": hub.download("org/nothing", cwd=tmp_path),
        "or it is private": hub.download("org/private", cwd=tmp_path),
        "the token is not valid": hub.download("org/private", cwd=tmp_path, **bad),
        "gated: only accounts that accepted its terms": hub.download("org/gated", cwd=tmp_path),
        "this token may not see it": hub.download("org/nothing", cwd=tmp_path, **hub.token),
        "has no branch, tag or commit 'v9'": hub.download("org/open", "--revision", "v9", cwd=tmp_path),
    }
    for words, done in messages.items():
        assert words in one_to_three_lines(done)
    assert f"--token-file FILE or {variable}" in messages["or it is private"].stderr
    assert not list(tmp_path.iterdir())
    for name in ("gated", "private"):
        assert hub.download(f"org/{name}", cwd=tmp_path, **hub.token).code == 0


def test_a_gated_repository_that_another_account_may_see(huggingface: Hub, tmp_path: Path) -> None:
    huggingface.server.repos["org/gated"] = Repo({"config.json": b"{}"}, gated=True)
    done = huggingface.download("org/gated", cwd=tmp_path, HF_TOKEN="another-account")
    assert "this token's account has not been granted access" in one_to_three_lines(done)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["smollm2"], "this recipe fits many models"),
        (["nothing-like-it"], "no recipe is named"),
        (["a/b/c"], "not a repository's name"),
        (["org/mo del"], "not a repository's name"),
        (["../secret"], "no"),
        (["org/model", "--token-file", "token", "--from", "auto"], "say which hub"),
        (["org/model", "--token-file", "missing", "--from", "huggingface"], "No such file"),
        (["deepseek-r1-w8a8", "--from", "huggingface"], "the recipe's model is on modelers"),
    ],
)
def test_wrong_usage(run_qtool: Any, tmp_path: Path, args: list[str], words: str) -> None:
    (tmp_path / "token").write_text(TOKEN)
    done = run_qtool("download", *args, cwd=tmp_path, env={"HF_HUB_OFFLINE": "0"})
    assert words in one_to_three_lines(done)


# ---------------------------------------------------------------- interrupted, resumed, verified


def test_it_continues_inside_a_file(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("close", at=1_000_000), Fault("status", status=400, times=FOREVER)]
    failed = hub.download("org/model", cwd=tmp_path)
    assert (failed.code, failed.stdout) == (1, ""), failed.stderr
    assert not (tmp_path / "model").exists()
    sizes = [path.stat().st_size for path in (partial(tmp_path / "model") / "incomplete").iterdir()]
    kept = next(size for size in sizes if 700_000 < size <= 1_000_000)

    hub.server.faults.clear()
    behind = hub.server.behind  # type: ignore[attr-defined]
    behind.requests.clear()
    done = hub.download("org/model", cwd=tmp_path)
    assert (done.code, done.stdout) == (0, f"{tmp_path / 'model'}\n"), done.stderr
    assert contents(tmp_path / "model") == wanted(model_repo)
    asked = [headers.get("range") for _, path, headers in behind.requests if SHARD in path]
    assert asked == [f"bytes={kept}-"]
    assert not partial(tmp_path / "model").exists()


def test_a_wrong_byte_in_what_an_earlier_run_left_is_found(
    hub: Hub, model_repo: dict[str, bytes], tmp_path: Path
) -> None:
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("close", at=1_000_000), Fault("status", status=400, times=FOREVER)]
    assert hub.download("org/model", cwd=tmp_path).code == 1
    hub.server.faults.clear()
    changed: list[Path] = []
    for file in [*partial(tmp_path / "model").rglob("*")]:
        if file.is_file() and (data := bytearray(file.read_bytes())):
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            changed.append(file)
    assert {file.parent.name for file in changed} >= {"complete", "incomplete"}
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "model") == wanted(model_repo)


def test_verify_finds_what_changed_and_overwrite_repairs_it(
    hub: Hub, model_repo: dict[str, bytes], tmp_path: Path
) -> None:
    assert hub.download("org/model", cwd=tmp_path).code == 0
    folder = tmp_path / "model"
    done = hub.run("download", "--verify", folder)  # no hub to be reached from here
    assert (done.code, done.stdout) == (0, f"{folder}\n"), done.stderr

    data = bytearray((folder / SHARD).read_bytes())
    data[-7] ^= 1
    (folder / SHARD).write_bytes(data)
    (folder / "extra.safetensors").write_bytes(b"x")
    done = hub.run("download", "--verify", folder)
    assert (done.code, done.stdout) == (1, "")
    assert f"{SHARD} has other bytes" in done.stderr
    (folder / "README.md").unlink()
    assert "README.md is missing" in hub.run("download", "--verify", folder).stderr
    assert hub.download("org/model", "--offline", cwd=tmp_path).code == 1
    assert hub.download("org/model", cwd=tmp_path).code == 2

    behind = hub.server.behind  # type: ignore[attr-defined]
    behind.requests.clear()
    done = hub.download("org/model", "--overwrite", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert contents(folder) == wanted(model_repo)
    assert [path for _, path, _ in behind.requests if "model-00002" in path] == []  # was right already
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_killed_while_the_new_folder_took_the_old_ones_place(
    hub: Hub, model_repo: dict[str, bytes], tmp_path: Path, there: bool
) -> None:
    """Before the new one was in place, or before the old one was gone: either way nothing stays beside it."""
    assert hub.download("org/model", cwd=tmp_path).code == 0
    old = tmp_path / ".model.replaced-4000000"
    (tmp_path / "model").rename(old)
    if there:
        shutil.copytree(old, tmp_path / "model")
        (tmp_path / "model" / SHARD).unlink()
    (old / "README.md").unlink()
    assert hub.download("org/model", "--overwrite", cwd=tmp_path).code == 0
    assert contents(tmp_path / "model") == wanted(model_repo)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_verify_of_what_is_no_download(run_qtool: Any, tmp_path: Path) -> None:
    done = run_qtool("download", "--verify", tmp_path)
    assert "no qtool.lock.json" in one_to_three_lines(done)
    (tmp_path / "qtool.lock.json").write_text('{"files": {"../../etc/passwd": {"size": 1, "sha256": "00"}}}')
    assert "points outside the folder" in one_to_three_lines(run_qtool("download", "--verify", tmp_path))
    lock = {"hub": "huggingface", "endpoint": "https://x.org", "repo": "org/name", "revision": "main", "commit": "c0f"}
    for change in ({"hub": "x"}, {"repo": "x; rm -r y"}, {"commit": "$(rm -r y)"}, {"commit": ""}):  # part of a hint
        (tmp_path / "qtool.lock.json").write_text(json.dumps(lock | change | {"files": {}}))
        assert "no hub has such a repository" in one_to_three_lines(run_qtool("download", "--verify", tmp_path))


def test_a_new_commit_is_not_taken_unasked(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    assert hub.download("org/model", cwd=tmp_path).code == 0
    newer = model_files(seed=2)
    hub.server.repos["org/model"] = Repo(newer, commit="beef" * 10)
    done = hub.download("org/model", cwd=tmp_path)
    assert "holds commit c0ffee000000, the hub has beefbeefbeef" in one_to_three_lines(done)
    assert contents(tmp_path / "model") == wanted(model_repo)
    assert hub.download("org/model", "--overwrite", cwd=tmp_path).code == 0
    assert contents(tmp_path / "model") == wanted(newer)


def test_nothing_else_is_overwritten(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        assert "at: " in one_to_three_lines(hub.download("org/model", *options, cwd=tmp_path))
    assert contents(tmp_path / "model") == {"mine.txt": b"mine"}
    (tmp_path / "model" / "mine.txt").unlink()
    assert hub.download("org/model", cwd=tmp_path).code == 0  # an empty folder is as good as none


def test_offline_uses_what_is_there(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    done = hub.download("org/model", "--offline", cwd=tmp_path)
    assert "no complete download is there" in one_to_three_lines(done)
    assert hub.download("org/model", cwd=tmp_path).code == 0
    requests = len(hub.server.requests)
    for options, env in ((["--offline"], {}), (["--verify"], {"HF_HUB_OFFLINE": "1"})):
        done = hub.download("org/model", *options, cwd=tmp_path, **env)
        assert (done.code, done.stdout) == (0, f"{tmp_path / 'model'}\n"), done.stderr
    assert len(hub.server.requests) == requests
    assert hub.download("org/model", "--offline", "--revision", "v7", cwd=tmp_path).code == 2


def test_a_half_folder_is_no_model(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    hub.server.faults[f"org/model/{SHARD}"] = [Fault("status", status=400, times=FOREVER)]
    assert hub.download("org/model", cwd=tmp_path).code == 1
    for folder in (tmp_path / "model", partial(tmp_path / "model")):
        done = hub.run("quantize", folder, "--dry-run")
        assert done.code == 2
        assert "no such folder" in done.stderr or "no config.json" in done.stderr


def test_no_room_is_told_before_the_first_byte(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    hub.server.repos["org/model"].listed[SHARD] = {"size": 1 << 49}
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 1
    assert "bytes, " in done.stderr
    assert "--to" in done.stderr
    assert not list(tmp_path.iterdir())
    assert not hub.server.sent("/resolve/")
    assert not hub.server.sent("/media/")


def test_a_repository_that_contradicts_itself(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    del model_repo["model-00002-of-00002.safetensors"]
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 1
    assert "damaged on the hub: model.safetensors.index.json: names 'model-00002-of-00002.safetensors'" in done.stderr
    model_repo["model-00002-of-00002.safetensors"] = model_repo[SHARD][:-4]
    done = hub.download("org/model", cwd=tmp_path)
    assert "damaged on the hub: model-00002-of-00002.safetensors: not a valid safetensors file" in done.stderr
    assert not (tmp_path / "model").exists()


def test_two_at_once(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    folder = partial(tmp_path / "model")
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    command = [sys.executable, "-m", "qtool", "download", "org/model", "--from", hub.name]
    env = {**os.environ, **hub.env, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) for _ in range(2)]
    for process in both:
        assert process.stderr is not None
        assert any("waiting" in line for line in process.stderr)
    os.close(handle)
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{tmp_path / 'model'}\n"), err
    assert contents(tmp_path / "model") == wanted(model_repo)
    assert len([path for _, path, _ in hub.server.behind.requests if SHARD in path]) == 1  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_interrupted_by_the_user(hub: Hub, model_repo: dict[str, bytes], tmp_path: Path) -> None:
    import signal

    hub.server.faults[f"org/model/{SHARD}"] = [Fault("stall", at=1_000_000)]
    command = [sys.executable, "-m", "qtool", "download", "org/model", "--from", hub.name]
    env = {**os.environ, **hub.env, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "60", "DEFAULT_REQUEST_TIMEOUT": "60"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    incomplete = partial(tmp_path / "model") / "incomplete"
    deadline = time.monotonic() + 120
    while not holds_more_than(700_000, incomplete):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    done = hub.download("org/model", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "model") == wanted(model_repo)


def holds_more_than(size: int, folder: Path) -> bool:
    """Whether a file in there is larger, while another process makes and renames them."""
    with contextlib.suppress(FileNotFoundError):
        return any(file.stat().st_size > size for file in folder.glob("*"))
    return False


# ---------------------------------------------------------------- tokens


def everything_written(*folders: Path) -> bytes:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return b"".join(file.read_bytes() for file in files)


@pytest.mark.parametrize(
    "fault", [None, Fault("echo", status=400), Fault("echo", status=403), Fault("echo", status=404)]
)
def test_a_token_is_nowhere_to_be_seen(hub: Hub, tmp_path: Path, fault: Fault | None) -> None:
    files = model_files()
    hub.server.repos["org/private"] = Repo(files, private=True)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    places = {name: str(tmp_path / name) for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME")}
    (tmp_path / "work").mkdir()
    if fault:
        hub.server.faults["org/private/api"] = [replace(fault)]
    args: list[str | Path] = ["org/private", "--token-file", tmp_path / "token", "--debug"]
    done = hub.download(*args, cwd=tmp_path / "work", HF_DEBUG="1", **places)
    assert (done.code == 0) == (fault is None), done.stderr
    if fault is None:
        hub.server.faults["org/private/config.json"] = [Fault("echo", status=400)]
        again = hub.download(*args, "--to", "again", cwd=tmp_path / "work", HF_DEBUG="1", **places)
        assert again.code != 0
        assert TOKEN not in again.stdout + again.stderr
    assert hub.server.sent("/api/")[0][2]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in done.stdout + done.stderr
    (tmp_path / "token").unlink()
    assert TOKEN.encode() not in everything_written(tmp_path)
    assert list((tmp_path / "XDG_STATE_HOME").rglob("*.log"))  # so there was something to look at


def test_a_token_that_the_client_keeps_is_not_shown_either(huggingface: Hub, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    huggingface.server.repos["org/private"] = Repo(model_files(), private=True)
    huggingface.server.faults["org/private/api"] = [Fault("echo", status=400)]
    env = {"HF_HOME": str(tmp_path / "home"), "XDG_STATE_HOME": str(tmp_path / "state"), "HF_DEBUG": "1"}
    (tmp_path / "work").mkdir()
    done = huggingface.download("org/private", "--debug", cwd=tmp_path / "work", **env)
    assert done.code == 1
    assert huggingface.server.sent("/api/")[0][2]["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in everything_written(tmp_path / "state", tmp_path / "work")


def test_a_token_is_on_no_command_line(hub: Hub, tmp_path: Path) -> None:
    hub.server.repos["org/private"] = Repo(model_files(), private=True)
    hub.server.faults[f"org/private/{SHARD}"] = [Fault("stall", at=10)]
    command = [sys.executable, "-m", "qtool", "download", "org/private", "--from", hub.name]
    env = {**os.environ, **hub.env, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    (tmp_path / "token").write_text(TOKEN)
    process = subprocess.Popen([*command, "--token-file", "token"], cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not hub.server.behind.requests:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        lines = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines.append((folder / "cmdline").read_bytes())
            except OSError:
                continue
        assert any(b"qtool.hub.worker" in line for line in lines)
        assert not any(TOKEN.encode() in line for line in lines)
    finally:
        process.terminate()
        process.communicate()


def test_a_redirect_does_not_take_the_token_along(hub: Hub, tmp_path: Path) -> None:
    files = model_files()
    hub.server.repos["org/private"] = Repo(files, private=True)
    done = hub.download("org/private", cwd=tmp_path, **hub.token)
    assert done.code == 0, done.stderr
    assert all(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.server.requests)
    elsewhere = hub.server.behind.requests  # type: ignore[attr-defined]
    assert len(elsewhere) == 2
    assert not [headers for _, _, headers in elsewhere if "authorization" in headers]
    assert TOKEN not in str(elsewhere)


def test_the_next_page_of_a_listing_does_not_take_the_token_along(huggingface: Hub, tmp_path: Path) -> None:
    server = huggingface.server
    server.repos["org/model"] = Repo(model_files())
    server.next_page_at = server.redirect
    done = huggingface.download("org/model", cwd=tmp_path, **huggingface.token)
    assert done.code == 0, done.stderr
    pages = [headers for _, path, headers in server.behind.requests if "cursor=" in path]  # type: ignore[attr-defined]
    assert pages
    assert not [headers for headers in pages if "authorization" in headers]


@pytest.mark.parametrize("host", ["evil-modelers.cn", "elsewhere.example"])
def test_a_redirect_to_a_stranger_is_refused(modelers: Hub, tmp_path: Path, host: str) -> None:
    modelers.server.repos["org/model"] = Repo(model_files())
    modelers.server.redirect = f"https://{host}"
    done = modelers.download("org/model", cwd=tmp_path, **modelers.token)
    assert (done.code, done.stdout) == (1, ""), done.stderr
    assert modelers.server.behind.requests == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", [b"", b"two words", b"two\nlines", b"\xff\xfe", "naïve".encode()])
def test_what_is_no_token_is_not_shown(run_qtool: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    args = ["org/model", "--from", "huggingface", "--token-file", tmp_path / "token"]
    done = run_qtool("download", *args, env={"HF_HUB_OFFLINE": "0"})
    assert "does not hold a token" in one_to_three_lines(done)
    for word in content.decode(errors="replace").split():
        assert word not in done.stderr


# ---------------------------------------------------------------- mirrors, proxies, endpoints


def test_a_proxy_is_used_for_hugging_face(huggingface: Hub, tmp_path: Path) -> None:
    huggingface.server.repos["org/model"] = Repo({"config.json": b"{}"})
    env = {"HF_ENDPOINT": "http://hub.example", "NO_PROXY": "", "no_proxy": ""}
    env |= dict.fromkeys(("HTTP_PROXY", "http_proxy"), huggingface.server.url)
    done = huggingface.download("org/model", cwd=tmp_path, **env)
    assert done.code == 0, done.stderr
    assert {headers["host"] for _, _, headers in huggingface.server.requests} == {"hub.example"}


@pytest.mark.parametrize("endpoint", ["http://modelers.cn", "https://evil-modelers.cn", "https://hub.example"])
def test_an_endpoint_that_openmind_must_not_have(modelers: Hub, tmp_path: Path, endpoint: str) -> None:
    done = modelers.download("org/model", cwd=tmp_path, OPENMIND_HUB_ENDPOINT=endpoint)
    assert "OPENMIND_HUB_ENDPOINT" in one_to_three_lines(done)
    assert not modelers.server.requests


def test_an_address_where_nobody_answers(huggingface: Hub, tmp_path: Path) -> None:
    done = huggingface.download("org/model", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.code, done.stdout) == (1, "")
    retries, error = done.stderr.split("error: ")
    assert all(line.startswith("warning: http://127.0.0.1:9: can't be reached") for line in retries.splitlines())
    assert "can't be reached" in error
    assert len(error.splitlines()) <= 3


def test_homes_that_openmind_refuses(modelers: Hub, model_repo_modelers: dict[str, bytes], tmp_path: Path) -> None:
    done = modelers.download("org/model", cwd=tmp_path, HOME="/var/lib/qtool", XDG_CACHE_HOME="/var/cache")
    assert done.code == 0, done.stderr
    assert contents(tmp_path / "model") == wanted(model_repo_modelers)


@pytest.fixture
def model_repo_modelers(modelers: Hub) -> dict[str, bytes]:
    files = model_files()
    modelers.server.repos["org/model"] = Repo(files)
    return files


# ---------------------------------------------------------------- pipes


def shell(script: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    bin_folder = cwd / "bin"
    bin_folder.mkdir()
    command = bin_folder / "qtool"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m qtool "$@"\n')
    command.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-ec", script], cwd=cwd, env=env | {"PATH": path}, capture_output=True, text=True
    )


def test_commands_pipe(huggingface: Hub, qtool_environment: dict[str, str], tiny_llama: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
    huggingface.server.repos["org/tiny"] = Repo(files)
    env = qtool_environment | huggingface.env
    done = shell(
        "qtool download org/tiny --from huggingface"
        " | qtool quantize - --samples 2 --seq-len 16"
        " | qtool generate - --runtime transformers --prompt 'I am' --max-tokens 3",
        env,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["prompt"] == "I am"
    assert answer["completion_tokens"] == 3
    quantized = tmp_path / "tiny-w8a8"
    assert (quantized / "qtool.json").exists()
    assert not (quantized / "qtool.lock.json").exists()
    shutil.rmtree(tmp_path / "bin")
    shutil.rmtree(quantized)
    script = 'qtool quantize "$(qtool download org/tiny --from huggingface)" --samples 2 --seq-len 16'
    done = shell(script, env, tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{quantized}\n"), done.stderr
