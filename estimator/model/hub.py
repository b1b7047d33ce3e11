"""The hub, or what was fetched from it before: without a network, its libraries retry for half a minute before they say so."""

from __future__ import annotations

import importlib
import os
import socket
import urllib.parse
import urllib.request


def settle_for_the_cache_without_a_network() -> None:
    """Puts the hub's libraries into their offline mode, for this process, where the hub's name cannot be resolved.

    With a proxy it is the proxy that resolves names, and nothing is changed.
    """
    if urllib.request.getproxies() or _resolves(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # read by these libraries as they are loaded; some may be already
    for name in ("huggingface_hub.constants", "datasets.config"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _resolves(address: str) -> bool:
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(address).hostname, 443)
    except OSError:
        return False
    return True
