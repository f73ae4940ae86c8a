"""What is checked on every single request of a hub's client, redirects and pages of a listing included.

Both clients would send the token to hosts that only the hub's answer names: huggingface_hub 2.4 with the next page of
a listing, openmind_hub 1.3 with every redirect of a download.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from qtool.errors import QtoolError

_PORTS = {"http": 80, "https": 443}


class Guard:
    """Decides where a request may go, and whether the token may go with it.

    Args:
        endpoint: the hub's address, the only one that gets the token.
        domains: if any, requests go to these and to names under them only.
    """

    def __init__(self, endpoint: str, domains: Sequence[str] = ()) -> None:
        self._origin = _origin(endpoint)
        self._domains = tuple(domains)

    def admit(self, url: str) -> None:
        """Raises QtoolError for an address to which the hub must not send us."""
        scheme, host, _ = _origin(url)
        if scheme not in _PORTS or (self._origin[0] == "https" and scheme != "https"):
            raise QtoolError(f"refused: the hub redirects to an unprotected address ({scheme})", where=host)
        if self._domains and not any(host == name or host.endswith(f".{name}") for name in self._domains):
            raise QtoolError("refused: the hub redirects to a host that is not its own", where=host)

    def trusts(self, url: str) -> bool:
        """Whether the token may go to this address: the endpoint's own scheme, host and port."""
        return _origin(url) == self._origin


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme.lower(), (parts.hostname or "").lower().rstrip("."), parts.port or _PORTS.get(parts.scheme)
