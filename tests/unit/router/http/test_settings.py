"""The HTTP port as an operator switches it on, and what it needs."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest

from router import http_extra
from router.config import RouterConfig
from tests.unit.router.test_process import ROOT, router

REGISTRY = {"registry": "static://127.0.0.1:1"}
LIBRARIES = ("starlette", "uvicorn", "httpx", "pydantic", "router.http")


@pytest.mark.parametrize("host", ["images.example.org", "a:8080", "10.0.0.1", "x_y-z"])
def test_hosts_of_images(host: str) -> None:
    assert RouterConfig(**REGISTRY, image_url_hosts=(host,)).image_url_hosts == (host,)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_url_hosts": ("http://a.example",)}, "image_url_hosts are names"),
        ({"image_url_hosts": ("a.example/x",)}, "image_url_hosts are names"),
        ({"image_url_hosts": ("*.example",)}, "image_url_hosts are names"),
        ({"http_port": -1}, "a port lies between"),
        ({"ui": True}, "ui needs --http-port"),
        ({"http_port": 70000}, "a port lies between"),
        ({"http_timeout_s": 0}, "http_timeout_s must be greater than 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RouterConfig(**REGISTRY, **settings)


def test_a_port_without_its_libraries_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_extra, "SERVER", "router.http.of_a_library_that_is_missing")
    with pytest.raises(ValueError, match=r"pip install '\.\[http\]'"):
        RouterConfig(**REGISTRY, http_port=0)
    RouterConfig(**REGISTRY)


def test_plaintext_stays_on_loopback() -> None:
    """The host is the gRPC listener's, and so is the rule."""
    code = "from router.config import RouterConfig; "
    code += "RouterConfig(registry='static://127.0.0.1:1', http_port=0, host='0.0.0.0')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "without TLS everybody who reaches 0.0.0.0" in ended.stderr


def test_without_a_port_nothing_of_it_is_loaded() -> None:
    code = f"import sys, router.__main__; print([name for name in {LIBRARIES!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_a_process_announces_it_and_ends_with_it() -> None:
    with router("--registry", "static://127.0.0.1:1", "--http-port", "0") as (process, line):
        health = httpx.get(f"http://{line['http']}/health", trust_env=False)
        assert (health.status_code, health.json()) == (503, {"status": "NOT_SERVING"})
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    with router("--registry", "static://127.0.0.1:1") as (_, line):
        assert "http" not in line
