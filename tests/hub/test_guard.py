"""Where requests may go, and the token with them."""

from __future__ import annotations

import pytest

from qtool.errors import QtoolError
from qtool.hub.guard import Guard

DOMAINS = ["modelers.cn", "osinfra.cn"]


@pytest.mark.parametrize(
    "url",
    ["https://modelers.cn/x", "https://MODELERS.cn:443/x", "https://modelers.cn./x", "https://u:p@modelers.cn/x"],
)
def test_the_token_goes_to_the_endpoint(url: str) -> None:
    assert Guard("https://modelers.cn").trusts(url)


@pytest.mark.parametrize(
    "url",
    ["http://modelers.cn/x", "https://modelers.cn:8443/", "https://cdn.modelers.cn/", "https://evil-modelers.cn/",
     "https://modelers.cn.evil.example/", "https://modelers.cn@evil.example/", "https://evil.example/modelers.cn"],
)  # fmt: skip
def test_the_token_goes_nowhere_else(url: str) -> None:
    assert not Guard("https://modelers.cn").trusts(url)


def test_only_the_hubs_own_domains() -> None:
    guard = Guard("https://modelers.cn", DOMAINS)
    for url in ("https://modelers.cn/", "https://a.b.osinfra.cn/x"):
        guard.admit(url)
    for url in (
        "https://evil-modelers.cn/",
        "https://modelers.cn.evil.example/",
        "https://osinfra.cnn/",
        "https://cn/",
    ):
        with pytest.raises(QtoolError, match="not its own"):
            guard.admit(url)


@pytest.mark.parametrize("url", ["http://huggingface.co/", "ftp://huggingface.co/", "file:///etc/passwd"])
def test_no_way_down_from_https(url: str) -> None:
    with pytest.raises(QtoolError, match="unprotected"):
        Guard("https://huggingface.co").admit(url)


def test_a_mirror_without_tls_may_lead_where_it_likes_but_not_into_files() -> None:
    guard = Guard("http://127.0.0.1:8000")
    guard.admit("http://127.0.0.1:9000/x")
    with pytest.raises(QtoolError):
        guard.admit("file:///etc/passwd")
