"""What the command says beside an error: who answers at the address, what is missing, what to do."""

import functools
import http.server
import socket
import threading
from concurrent import futures

import grpc
import pytest
from vlcache.cli import main
from vlcache.cli.probe import Peer, peer_at

from tests.certificates import HOSTS, Certificates
from tests.unit.client.service import fail


class Page(http.server.BaseHTTPRequestHandler):
    """Says the same to everybody."""

    def __init__(self, *arguments, text):
        self._text = text
        super().__init__(*arguments)

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self._text)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def http_server():
    """Starts a web server that says one text; returns its address."""
    servers = []

    def start(text):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Page, text=text))
        threading.Thread(target=server.serve_forever).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def certificates(tmp_path):
    return Certificates(tmp_path / "ca")


@pytest.fixture
def tls_service(certificates):
    """The address of a server that speaks TLS."""
    files = certificates.files("router", hosts=HOSTS)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([(files.key.read_bytes(), files.cert.read_bytes())])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


@pytest.fixture
def closed_port():
    """An address at which nobody listens, and nobody else will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def failing(capsys):
    """Runs `vlcache status`; returns what it said."""

    def run(address, *options):
        assert main(["status", "--address", address, *map(str, options)]) == 1
        return capsys.readouterr().err.splitlines()[-1].strip()

    return run


def test_nobody_is_there(closed_port, failing):
    assert failing(closed_port).startswith(f"nobody listens at {closed_port}: `vlcache serve` starts")


def test_a_metrics_port_is_no_router(http_server, failing):
    address = http_server(b"# TYPE vlcache_build_info gauge\n")
    assert failing(address) == (
        f"the metrics port of a vlcache process answers at {address}: --address wants the router's gRPC port"
    )


def test_a_web_server_is_no_router(http_server, failing):
    assert failing(http_server(b"<html>")).startswith("an HTTP server answers at")


def test_a_service_with_tls_wants_a_ca(tls_service, failing):
    assert failing(tls_service) == f"{tls_service} speaks TLS: --ca-file says which CA vouches for it"


def test_a_service_with_tls_may_be_another_one(tls_service, failing, tmp_path):
    another = Certificates(tmp_path / "another")
    assert "of another CA" in failing(tls_service, "--ca-file", another.ca)


def test_a_service_without_tls_wants_none(service, failing, certificates):
    assert failing(service.address, "--ca-file", certificates.ca).startswith(f"{service.address} speaks no TLS")


def test_what_never_answers_is_not_explained():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert peer_at(address) is Peer.OTHER


@pytest.mark.parametrize("address", ["unix:/tmp/x", "dns:///localhost:1", "localhost"])
def test_other_addresses_are_left_alone(address):
    assert peer_at(address) is Peer.OTHER


@pytest.mark.parametrize(
    ("code", "details", "hint"),
    [
        (grpc.StatusCode.UNAVAILABLE, {"reason": "NO_WORKER", "retryable": "false"}, "`vlcache status` shows"),
        (grpc.StatusCode.UNAUTHENTICATED, {"reason": "NO_TOKEN"}, "put a token into VLCACHE_TOKEN"),
        (grpc.StatusCode.UNAUTHENTICATED, {"reason": "BAD_TOKEN"}, "not in the service's list"),
        (grpc.StatusCode.NOT_FOUND, {"reason": "UNKNOWN_MODEL"}, "--model names one"),
        (grpc.StatusCode.UNIMPLEMENTED, {}, "is no router"),
    ],
)
def test_what_a_service_says_is_explained(service, capsys, code, details, hint):
    service.attempts = [[fail(code, "no", **details)]]
    assert main(["ask", "--address", service.address, "Which?"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("vlcache: no [")
    assert hint in second


def test_other_errors_stand_alone(service, capsys):
    service.attempts = [[fail(grpc.StatusCode.DATA_LOSS, "no")]]
    assert main(["ask", "--address", service.address, "Which?"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_token_in_plaintext_is_refused_in_the_words_of_the_command(monkeypatch, capsys):
    monkeypatch.setenv("VLCACHE_TOKEN", "secret")
    assert main(["status", "--address", "router.example:1"]) == 2
    assert "--ca-file" in capsys.readouterr().err
