"""What the commands draw on a terminal with rich, and that they do without."""

import sys

import pytest
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import whole_answer
from tests.unit.client.terminal import Terminal

WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from vlcache.cli import main; sys.exit(main())"


@pytest.fixture
def ready(service):
    """A service with a worker and answers enough."""
    kv = pb.KVBytes(capacity=100, active=50)
    service.info = pb.GetServerInfoResponse(
        version="1.2.3", workers=[pb.Worker(name="d0", role="decode", address="h:2", state="ready", kv=kv)]
    )
    service.attempts = [whole_answer() for _ in range(4)]
    return service


def shown(service, *command, program=("-m", "vlcache.cli"), until):
    with Terminal(sys.executable, *program, *command, "--address", service.address) as terminal:
        found = terminal.shows(until)
        assert terminal.process.wait(timeout=20) == 0
    return found


def test_ask_shows_a_bar_of_what_was_kept(ready):
    found = shown(ready, "ask", "Which?", until=r"a red dot[\s\S]*mean ITL")
    assert "█░░░░░░░░░ KV 2.0 MiB full, 256.0 KiB kept" in found


def test_status_shows_bars_of_memory(ready):
    found = shown(ready, "status", until=r"1\.2\.3[\s\S]*0 requests:")
    assert "██████" in found
    assert "█ active" in found


def test_bench_shows_how_far_it_is_and_tables(ready):
    options = ("--num-prompts", "3", "--image-size", "16x16", "--max-concurrency", "1")
    assert "3/3" in shown(ready, "bench", *options, until=r"requests [^\r\n]*3/3[\s\S]*E2EL")


@pytest.mark.parametrize(
    ("command", "until"), [(("ask", "Which?"), r"28 text\) \| answer 3 tokens \| KV"), (("status",), "KV CAPACITY")]
)
def test_without_rich_it_is_plain(ready, command, until):
    """What rich draws has neither."""
    shown(ready, *command, program=("-c", WITHOUT_RICH), until=until)
