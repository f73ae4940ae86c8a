"""Names, sizes and hashes that a hub announces, checked before anything is done with them.

A name that is fine on Linux but leaves the folder, names a device or meets another name on Windows or macOS is refused
as well: models are copied, and a check that depends on the machine is a check nobody tests.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from qtool.errors import InputError
from qtool.hub.listing import RemoteFile

MAX_FILES = 100_000
_MAX_COMPONENT = 255  # bytes, what file systems allow
_MAX_PATH = 1024
_MAX_BYTES = 1 << 50
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check(files: Iterable[RemoteFile], where: str) -> None:
    """Refuse files that must not be written, with the reason.

    Args:
        files: what is about to be downloaded.
        where: the repository, for the message.

    Raises:
        InputError: a name that leaves the folder or is no plain name, two names that are one on some file system,
            an impossible size, no hash, something that is no file, or too many of them.
    """
    files = list(files)
    if len(files) > MAX_FILES:
        raise InputError(f"refused: {len(files):,} files, at most {MAX_FILES:,} are taken", where=where)
    for file in files:
        reason = name_problem(file.path) or _data_problem(file)
        if reason:
            raise _refused(file.path, reason, where)
    _check_collisions([file.path for file in files], where)


def name_problem(path: str) -> str | None:
    """Why a name that comes from elsewhere must not become a file, or None."""
    if not isinstance(path, str) or not path:
        return "it has no name"
    if len(path.encode(errors="replace")) > _MAX_PATH:
        return f"its name is longer than {_MAX_PATH} bytes"
    if bad := next((c for c in path if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")), None):
        return f"its name has the invisible character U+{ord(bad):04X}"
    if path.startswith(("/", "~")) or re.match(r"[A-Za-z]:", path):
        return "its name is absolute"
    if bad := next((c for c in path if c in '\\<>:"|?*'), None):
        return f"its name has the character {bad}"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "its name points outside the folder" if part == ".." else "its name has an empty part"
        if part.endswith((".", " ")) or part.startswith(" "):
            return "a part of its name begins or ends with a blank, or ends with a dot"
        if _DEVICE.fullmatch(part):
            return f"{part} is a device on Windows"
        if len(part.encode()) > _MAX_COMPONENT:
            return f"a part of its name is longer than {_MAX_COMPONENT} bytes"
        if part.casefold() == ".git":
            return "it lies in a .git folder"
    return None


def folded(path: str) -> str:
    """The name as a file system sees it that knows neither case nor Unicode's variants."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def _data_problem(file: RemoteFile) -> str | None:
    if not file.digest:
        return "it is neither a file nor a folder with files in it: a link or a submodule"
    if not isinstance(file.digest, str) or not _DIGEST.fullmatch(file.digest):
        return "the hub gives no hash to check it with"
    if type(file.size) is not int or not 0 <= file.size <= _MAX_BYTES:
        return f"its size is {str(file.size)[:40]!r}"
    return None


def _check_collisions(paths: list[str], where: str) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(folded(path), path)
        if other is not path:
            what = "it is listed twice" if other == path else f"{shown(other)} is the same name on some file systems"
            raise _refused(path, what, where)
    for path in paths:
        parts = folded(path).split("/")
        for i in range(1, len(parts)):
            if file := seen.get("/".join(parts[:i])):
                raise _refused(path, f"{shown(file)} is a file, so it can't be a folder", where)


def shown(path: object) -> str:
    """A name from elsewhere, fit for a terminal."""
    return ascii(str(path)[:120])


def _refused(path: str, reason: str, where: str) -> InputError:
    return InputError(
        f"refused {shown(path)}: {reason}",
        where=where,
        hint="Leave it out with --exclude, and use the rest only if you trust the repository.",
    )
