"""What every test gets: no network, no files of the user's, Ctrl-C, and a reason where it is skipped."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

# huggingface_hub and transformers read these when they are imported. Offline, with a token, or with another endpoint or
# cache in the shell, tests of the Hub would ask something else than the stub on this machine; so they would by a proxy.
for _name in list(os.environ):
    if _name.startswith(("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")) or _name.lower().endswith("_proxy"):
        del os.environ[_name]
# Tests neither see nor fill the user's own cache.
_HUB_HOME = tempfile.TemporaryDirectory(prefix="lmkit-tests-")
os.environ["HF_HOME"] = _HUB_HOME.name
# A shell starts what runs in the background with SIGINT ignored, in what that starts too: no Ctrl-C would come.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Refuse every host but this one, and list the hosts that were asked for.

    What the test calls sees the error of a machine without a network. A test that promises no
    network call at all asserts that the list is empty.
    """
    asked: list[str] = []

    def refuse_names(look_up: Any) -> Any:
        def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
            if not _is_here(host):
                asked.append(str(host))
                raise socket.gaierror(socket.EAI_AGAIN, "tests have no network")
            return look_up(host, *arguments, **options)

        return getaddrinfo

    def refuse_addresses(connect: Any) -> Any:
        def guarded(self: socket.socket, address: Any) -> Any:
            if self.family in {socket.AF_INET, socket.AF_INET6} and not _is_here(address[0]):
                asked.append(str(address[0]))
                raise OSError(101, "tests have no network")
            return connect(self, address)

        return guarded

    # Without a network huggingface_hub waits 23 seconds between its tries.
    no_waiting = SimpleNamespace(sleep=lambda _seconds: None)
    monkeypatch.setattr("huggingface_hub.utils._http.time", no_waiting)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_names(socket.getaddrinfo))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse_addresses(getattr(socket.socket, name)))
    return asked


def _is_here(host: Any) -> bool:
    """Whether a host is this machine: localhost, a loopback address, or none at all."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in {None, "", "localhost"}:
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session", autouse=True)
def _remove_hub_home() -> Iterator[None]:
    yield
    _HUB_HOME.cleanup()
