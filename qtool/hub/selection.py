"""Which files of a repository are wanted.

By default everything a quantizer or a runtime reads: not the same weights again in another format, not what training
left behind, no pictures. What can be a pickle runs code when it is read, so it is never taken unasked.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from qtool.checkpoint.reader import LOCK
from qtool.errors import InputError
from qtool.hub.listing import RemoteFile
from qtool.hub.names import folded, shown

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".pdparams")
_OTHER_FORMATS = (".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".llamafile")
_MEDIA = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".wav", ".mp3", ".pdf")
_FOLDERS = ("onnx/", "openvino/", "coreml/", "runs/", "logs/", "original/", "metal/")
_TRAINING = (
    "optimizer*",
    "scheduler.*",
    "rng_state*",
    "training_args.*",
    "trainer_state.json",
    "*.distcp",
    "events.out.*",
)


def select(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str], where: str
) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """What to download, and what to leave.

    Args:
        files: everything the repository holds.
        include: globs on the whole path, `*` also across slashes; with any, exactly what they match.
        exclude: globs for what to leave in any case.
        where: the repository, for messages.

    Raises:
        InputError: nothing is left, a glob matches nothing, or the weights can be had as pickles only.
    """
    for pattern in include:
        if not any(_matches(file.path, pattern) for file in files):
            raise InputError(f"no file matches {pattern!r}", where=f"--include, {where}", hint="Look with --dry-run.")
    safetensors = any(_is_safetensors(file.path) for file in files)
    taken, left, pickles = [], [], []
    for file in files:
        path = str(file.path)
        if folded(path) == LOCK or any(_matches(path, pattern) for pattern in exclude):
            left.append(file)
        elif path.lower().endswith(PICKLES) and not any(_asks_for_pickle(pattern, path) for pattern in include):
            left.append(file)
            pickles.append(file)
        elif any(_matches(path, pattern) for pattern in include) if include else _useful(path, safetensors):
            taken.append(file)
        else:
            left.append(file)
    unasked = [file for file in pickles if not _training(file.path)]
    if unasked and not safetensors and not include:
        raise InputError(
            f"refused {shown(unasked[0].path)}: it can be a pickle, which runs code when it is read",
            where=where,
            hint=f"If you trust it, ask for it: --include '*{_suffix(unasked[0].path)}' --include '*.json' …",
        )
    if not taken:
        what = "nothing to download: everything is excluded" if files else "the repository is empty"
        raise InputError(what, where=where, hint="Look at it with --dry-run, or ask for files with --include.")
    return taken, left


def _is_safetensors(path: str) -> bool:
    """In the layout that everybody reads; Mistral's own (consolidated*.safetensors) repeats it."""
    return path.endswith(".safetensors") and not path.startswith("consolidated")


def _useful(path: str, safetensors: bool) -> bool:
    name = path.rpartition("/")[2].lower()
    if name.startswith(".git") or name.endswith(_OTHER_FORMATS + _MEDIA) or path.lower().startswith(_FOLDERS):
        return False
    return not _training(path) and not (safetensors and (name.endswith(".gguf") or name.startswith("consolidated")))


def _training(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return path.startswith("global_step") or any(fnmatchcase(name, pattern) for pattern in _TRAINING)


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern)


def _asks_for_pickle(pattern: str, path: str) -> bool:
    """A glob asks for a pickle by naming its suffix; `*` does not."""
    return _matches(path, pattern) and pattern.lower().endswith(_suffix(path).lower())


def _suffix(path: str) -> str:
    return "." + path.rpartition(".")[2]
