"""`vlcache chat`: turns, commands and ctrl-C, from a pipe and at a terminal."""

import json
import signal
import subprocess
import sys
import time

import grpc
import pytest
from vlcache import Compression
from vlcache.cli.conversation import HELP, Conversation

from tests.unit.client.service import compression, delta, fail, finished, started, whole_answer
from tests.unit.client.terminal import Terminal

COMMAND = (sys.executable, "-W", "error", "-m", "vlcache.cli", "chat")


def begin(service, *options):
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([*COMMAND, "--address", service.address, *options], text=True, **pipes)


def chat(service, lines, *options):
    """A chat from a pipe: exit code, stdout, lines of stderr."""
    with begin(service, *options) as process:
        out, err = process.communicate("\n".join(lines) + "\n", timeout=30)
    return process.returncode, out, err.splitlines()


def sent(request):
    """Roles and texts of a request."""
    return [(message.role, message.parts[-1].text) for message in request.messages]


def test_each_turn_carries_the_ones_before(service):
    service.attempts = [whole_answer(), whole_answer()]
    exit_code, out, err = chat(service, ["Which?", "", "And now?"])
    assert (exit_code, out) == (0, "a red dot\na red dot\n")
    assert [line.partition(" | ")[0] for line in err] == ["[KV 256.0 KiB of 2.0 MiB kept, 87.5 % saved"] * 2
    first, second = service.requests
    assert sent(first) == [("user", "Which?")]
    assert sent(second) == [("user", "Which?"), ("assistant", "a red dot"), ("user", "And now?")]


def test_commands_change_what_follows(service, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    service.attempts = [whole_answer() for _ in range(3)]
    lines = ["Which?", f"/image {tmp_path / 'b.png'}", "/retention 0.5", "Again?", "/clear", "New?", "/quit", "Never?"]
    exit_code, _, err = chat(service, lines, "--image", str(tmp_path / "a.png"), "--retention", "0.2")
    assert exit_code == 0
    first, second, third = service.requests
    assert [part.image.data for part in first.messages[0].parts[:-1]] == [b"a.png"]
    assert [part.image.data for part in second.messages[2].parts[:-1]] == [b"b.png"]
    assert [request.compression.retention for request in service.requests] == [0.2, 0.5, 0.5]
    assert sent(third) == [("user", "New?")]
    assert len(third.messages[0].parts) == 1
    assert err[1] == f"{tmp_path / 'b.png'} (5 bytes) goes with the next question"


def test_json_is_a_line_for_each_turn(service):
    service.attempts = [whole_answer(), whole_answer()]
    exit_code, out, err = chat(service, ["Which?", "And now?"], "--json")
    assert (exit_code, err) == (0, [])
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a red dot"] * 2


@pytest.mark.parametrize(
    ("line", "exit_code", "told"),
    [
        ("/retention 2", 2, "retention"),
        ("/image missing.png", 1, "missing.png"),
        ("/dance", 2, "/help"),
        ("/image", 2, "file"),
    ],
)
def test_a_bad_line_ends_a_script(service, line, exit_code, told):
    code, _, err = chat(service, [line, "Which?"])
    assert code == exit_code
    assert told in err[-1]
    assert service.requests == []


def test_a_failed_turn_ends_a_script_with_its_error(service):
    service.attempts = [[fail(grpc.StatusCode.NOT_FOUND, "no model", reason="UNKNOWN_MODEL")]]
    code, out, err = chat(service, ["Which?", "And now?"])
    assert (code, out) == (1, "")
    assert err[0].startswith("vlcache: no model [NOT_FOUND")
    assert "--model" in err[1]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(service):
    service.attempts = [[started(), delta("a ", 5), service.hang], whole_answer()]
    with begin(service) as process:
        process.stdin.write("Which?\n")
        process.stdin.flush()
        assert process.stdout.read(1) == "a"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("And now?\n", timeout=20)
    assert (process.returncode, out) == (0, "\na red dot\n")
    assert err.splitlines()[0] == "(stopped)"
    assert service.cancelled.is_set()
    assert sent(service.requests[1]) == [("user", "Which?"), ("assistant", "a "), ("user", "And now?")]


def test_an_answer_that_had_not_begun_leaves_no_turn(service):
    service.attempts = [[service.hang], whole_answer()]
    with begin(service) as process:
        process.stdin.write("Which?\n")
        process.stdin.flush()
        assert service.asked.wait(20)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate("And now?\n", timeout=20)
    assert (process.returncode, out) == (0, "a red dot\n")
    assert sent(service.requests[1]) == [("user", "And now?")]


def test_at_a_terminal(service):
    service.attempts = [
        [fail(grpc.StatusCode.NOT_FOUND, "no model")],
        [started(), delta("a dot", 5), compression(), finished()],
    ]
    with Terminal(*COMMAND, "--address", service.address) as terminal:
        terminal.shows("ctrl-D ends[^>]*> ")
        terminal.types("Which?\n")
        terminal.shows("no model[^>]*> ")
        terminal.types("half a li")
        terminal.shows("half a li")
        time.sleep(0.5)  # a signal that comes before readline waits for the next key is only seen at the line's end
        terminal.process.send_signal(signal.SIGINT)
        terminal.shows("\r\n> ")
        terminal.types("/retention 3\n")
        terminal.shows("retention must be[^>]*> ")
        terminal.types("Which?\n")
        terminal.shows("a dot[^>]*87.5 % saved[^>]*> ")
        terminal.types("\x04")
        assert terminal.process.wait(timeout=20) == 0
    assert sent(service.requests[1]) == [("user", "Which?")]


def test_help_lists_every_command():
    conversation = Conversation(Compression())
    assert conversation.command("/help") == HELP
    assert {line.split()[0] for line in HELP.splitlines()} == set(conversation._commands)
