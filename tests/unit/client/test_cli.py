import contextlib
import json
import signal
import subprocess
import sys

import grpc
import pytest
from PIL import Image
from vlcache.cli import main
from vlcache.formatting import format_bytes, format_table
from vlcache.v1 import inference_pb2 as pb

from tests.unit.client.service import (
    Step,
    compression,
    delta,
    fail,
    finished,
    started,
    transfer,
    whole_answer,
)


@pytest.fixture
def vlcache(service, capsys):
    """Runs a command against the service; returns (exit code, stdout, stderr)."""

    def run(command, *options):
        exit_code = main([command, "--address", service.address, *options])
        return exit_code, *capsys.readouterr()

    return run


def test_ask_prints_the_answer_and_then_its_cost(service, vlcache):
    service.attempts = [whole_answer()]
    exit_code, out, err = vlcache("ask", "Which?")
    assert (exit_code, out) == (0, "a red dot\n")
    (line,) = err.splitlines()
    assert line.startswith(
        "prompt 128 tokens (100 visual + 28 text) | answer 3 tokens | "
        "KV 2.0 MiB full, 256.0 KiB kept (12.5 % by vl_cache) | 293.0 KiB sent via memory | TTFT "
    )
    assert "TTST" in line
    assert "ITL" in line


def test_ask_says_when_less_was_kept_than_asked(service, vlcache):
    lowered = pb.GenerateResponse()
    lowered.CopyFrom(compression())
    lowered.compression.asked_retention = 0.4
    service.attempts = [[started(), delta("a ", 5), lowered, finished()]]
    assert "(12.5 % by vl_cache, 40.0 % asked)" in vlcache("ask", "Which?")[2]


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (pb.GUARD_OUTCOME_KEPT, "(12.5 % by vl_cache)"),
        (pb.GUARD_OUTCOME_GROWN, "(12.5 % by vl_cache, 5.0 % asked)"),
        (pb.GUARD_OUTCOME_REFUSED, "(12.5 % by vl_cache, no room for what the guard wants)"),
    ],
)
def test_ask_says_what_the_guard_did(service, vlcache, outcome, told):
    guarded = pb.GenerateResponse()
    guarded.CopyFrom(compression())
    guarded.compression.guard = outcome
    guarded.compression.asked_retention = 0.05 if outcome == pb.GUARD_OUTCOME_GROWN else 0.1
    service.attempts = [[started(), delta("a ", 5), guarded, finished()]]
    assert told in vlcache("ask", "Which?")[2]


def test_ask_streams(service, vlcache, monkeypatch):
    flushed = []
    monkeypatch.setattr("builtins.print", lambda *args, flush=False, **_: flushed.append((*args, flush)))
    service.attempts = [whole_answer()]
    vlcache("ask", "Which?")
    assert flushed[:3] == [("a ", True), ("red", True), (" dot", True)]


def test_every_option_reaches_the_service(service, vlcache, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        path.write_bytes(path.name.encode())
    service.attempts = [whole_answer()]
    images = [option for path in paths for option in ("--image", str(path))]
    settings = "--retention 0.2 --policy knorm --param window=32 --param pool=max --param deep=true --model m"
    scope = ("--budget-scope", "visual", "--min-retention", "0.05", "--max-dropped-attention", "0.02")
    wire = "--wire-bits 4 --key-channels 0.6 --wire-group 64 --wire-residual 0"
    sampling = "--max-new-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 4 --seed 11 --stop . --stop !"
    who = "--tenant team-a --priority -3"
    changes = "--presence-penalty 0.5 --frequency-penalty -0.5 --repetition-penalty 1.5 --min-new-tokens 2"
    more = "--logit-bias 5=-1.5 --logit-bias 6=2 --logprobs 3 --ignore-eos"
    form = ("--regex", "red|blue")
    words = f"{settings} {wire} {sampling} {changes} {more} {who}".split()
    film = paths[0].with_name("c.mp4")
    film.write_bytes(b"film")
    assert vlcache("ask", *images, "--video", str(film), "Which?", *scope, *form, *words, "--timeout", "9")[0] == 0

    (request,) = service.requests
    parts = request.messages[0].parts
    assert [part.image.data for part in parts[:2]] == [b"a.png", b"b.png"]
    assert (parts[2].video.file, parts[3].text, request.model) == (b"film", "Which?", "m")
    assert (request.compression.retention, request.compression.policy) == (0.2, "knorm")
    assert (request.compression.budget_scope, request.compression.min_retention) == (pb.BUDGET_SCOPE_VISUAL, 0.05)
    assert request.compression.max_dropped_attention == 0.02
    assert dict(request.compression.parameters.items()) == {"window": 32.0, "pool": "max", "deep": True}
    assert request.compression.wire == pb.WireParams(bits=4, key_channels=0.6, group=64, residual=0)
    sent = request.sampling
    assert (sent.max_new_tokens, sent.temperature, sent.top_p, sent.top_k, sent.seed) == (7, 0.5, 0.9, 4, 11)
    assert list(sent.stop) == [".", "!"]
    assert (sent.presence_penalty, sent.frequency_penalty, sent.repetition_penalty) == (0.5, -0.5, 1.5)
    assert (sent.min_new_tokens, sent.logprobs, sent.ignore_eos) == (2, 3, True)
    assert dict(sent.logit_bias) == {5: -1.5, 6: 2}
    assert sent.constraint == pb.Constraint(regex="red|blue")
    assert (service.tenants, request.priority) == (["team-a"], -3)
    assert 8 < service.remaining_s[0] < 9.2


def test_a_schema_is_a_file_or_a_text(service, vlcache, tmp_path):
    schema = '{"type": "integer"}'
    file = tmp_path / "schema.json"
    file.write_text(schema)
    for given in (schema, str(file)):
        service.attempts = [whole_answer()]
        assert vlcache("ask", "Which?", "--json-schema", given)[0] == 0
    assert [request.sampling.constraint.json_schema for request in service.requests] == [schema] * 2


def test_without_options_the_service_decides(service, vlcache):
    service.attempts = [whole_answer()]
    vlcache("ask", "Which?", "--max-kept-tokens", "64")
    (request,) = service.requests
    assert request.sampling == pb.SamplingParams()
    assert request.compression.max_kept_tokens == 64
    assert not request.compression.HasField("wire")
    assert request.compression.policy == ""
    assert (service.tenants, request.priority) == ([None], 0)


def test_ask_prints_the_first_answer_as_it_comes_and_the_others_below(service, vlcache):
    other = delta("blue", 9, reason=pb.FINISH_REASON_STOP)
    other.delta.choice = 1
    events = whole_answer()
    service.attempts = [[*events[:2], other, *events[2:]]]
    exit_code, out, _ = vlcache("ask", "Which?", "--n", "2")
    assert (exit_code, out) == (0, "a red dot\n[2] blue\n")
    assert service.requests[0].sampling.n == 2


def test_ask_json_is_one_line(service, vlcache):
    service.attempts = [whole_answer()]
    exit_code, out, err = vlcache("ask", "Which?", "--json")
    assert (exit_code, err) == (0, "")
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("a red dot", [5, 6, 7], "stop")
    assert answer["compression"]["layer_tokens"] == [20, 12]
    assert answer["transfer"]["sent_bytes"] == 300_000
    assert len(answer["timings"]["itl_s"]) == 2
    assert answer["seed"] == 2**63 + 1
    assert answer["request_id"] == service.requests[0].request_id


@pytest.mark.parametrize("steps", [[], [started(), delta("a ", 5)]])
def test_an_error_is_one_line_and_exit_code_1(service, vlcache, steps):
    service.attempts = [[*steps, fail(grpc.StatusCode.NOT_FOUND, "no model\nof that name")]]
    exit_code, out, err = vlcache("ask", "Which?")
    assert exit_code == 1
    assert out == ("a \n" if steps else "")
    request_id = service.requests[0].request_id
    assert err == f"vlcache: no model of that name [NOT_FOUND, request {request_id}]\n"


def test_an_error_leaves_json_output_empty(service, vlcache):
    service.attempts = [[started(), fail(grpc.StatusCode.DATA_LOSS)]]
    exit_code, out, err = vlcache("ask", "Which?", "--json")
    assert (exit_code, out, len(err.splitlines())) == (1, "", 1)


def test_an_unreadable_image_is_an_error(service, vlcache):
    exit_code, _, err = vlcache("ask", "--image", "missing.png", "Which?")
    assert exit_code == 1
    assert "missing.png" in err
    assert service.requests == []


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--retention", "1.5"], "retention"),
        (["--timeout", "0"], "total_s"),
        (["--param", "window"], "NAME=VALUE"),
        (["--retention", "0.1", "--max-kept-tokens", "9"], "not allowed"),
        (["--budget-scope", "text"], "budget-scope"),
        (["--top-k", "many"], "top-k"),
        (["--logit-bias", "a=1"], "TOKEN=BIAS"),
        (["--logit-bias", "1=101"], "logit_bias"),
        (["--tenant", "team a"], "tenant"),
        (["--priority", "101"], "priority"),
        (("--json-schema", "/nowhere.json"), "neither a JSON object nor a file"),
        (("--json-schema", "{"), "json_schema is no JSON"),
    ],
)
def test_wrong_usage_is_exit_code_2(service, vlcache, capsys, options, hint):
    try:
        exit_code, _, err = vlcache("ask", "Which?", *options)
    except SystemExit as stopped:
        exit_code, err = stopped.code, capsys.readouterr().err
    assert exit_code == 2
    assert hint in err.splitlines()[-1]
    assert service.requests == []


def explained() -> list[Step]:
    """An answer about an image of 2 x 2 patches behind two tokens of text, two layers of two heads."""
    told = compression()
    told.compression.kept.num_kv_heads = 2
    told.compression.kept.layers.extend([bytes([2, 1, 0, 1, 2, 0]), bytes([2, 2, 2, 2, 2, 2])])
    told.compression.kept.images.add(first_token=2, rows=2, columns=2, right=1, bottom=1)
    return [started(), delta("red", 5), told, transfer(), finished()]


def test_explain_draws_what_was_kept(service, vlcache, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    service.attempts = [explained()]
    options = ("--image", str(tmp_path / "a.png"), "--policy", "snap_kv", "-o", str(tmp_path / "out.png"))
    exit_code, out, err = vlcache("explain", "Which?", *options)
    assert (exit_code, out) == (0, "red\n")
    assert err.splitlines()[1] == str(tmp_path / "out.png")
    (request,) = service.requests
    assert (request.compression.explain, request.compression.policy) == (True, "snap_kv")
    assert len(request.messages[0].parts) == 2
    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)


def test_explain_json_names_the_picture(service, vlcache, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    service.attempts = [explained()]
    out = str(tmp_path / "out.png")
    exit_code, said, err = vlcache("explain", "Which?", "--image", str(tmp_path / "a.png"), "-o", out, "--json")
    document = json.loads(said)
    assert (exit_code, document["text"], document["picture"], err) == (0, "red", out, "")
    assert document["compression"]["kept"]["layers"][0] == [2, 1, 0, 1, 2, 0]


def test_only_explain_asks_for_it(service, vlcache):
    service.attempts = [whole_answer()]
    vlcache("ask", "Which?")
    assert not service.requests[0].compression.explain


def test_explain_says_why_there_is_no_picture(service, vlcache, tmp_path):
    service.attempts = [[started(), delta("red", 5), finished()]]
    exit_code, out, err = vlcache("explain", "Which?", "-o", str(tmp_path / "out.png"))
    assert (exit_code, out, list(tmp_path.iterdir())) == (2, "red\n", [])
    assert "ended before" in err


def test_explain_asks_nothing_without_pillow(service, vlcache, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("vlcache.explain.", "PIL"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    exit_code, _, err = vlcache("explain", "Which?")
    assert exit_code == 2
    assert "pip install 'vlcache[explain]'" in err
    assert service.requests == []


@pytest.fixture
def busy_service(service):
    service.info = pb.GetServerInfoResponse(
        version="1.2.3",
        workers=[
            pb.Worker(name="p0", role="prefill", address="h:1", state="ready", model="m", kv=pb.KVBytes(retained=2048)),
            pb.Worker(
                name="d0",
                role="decode",
                address="h:2",
                state="draining",
                model="m",
                requests_running=3,
                requests_waiting=4,
                kv=pb.KVBytes(capacity=2**30, reserved=2**20, filling=5 * 2**20, active=7 * 2**20),
            ),
        ],
        totals=pb.Totals(requests=9, kv_full_bytes=10 * 2**30, kv_kept_bytes=2**30, kv_sent_bytes=2**30),
    )
    return service


def test_status_shows_workers_and_savings(busy_service, vlcache):
    exit_code, out, err = vlcache("status")
    assert (exit_code, err) == (0, "")
    version, _, header, prefill, decode, _, totals = out.splitlines()
    assert version == "vlcache 1.2.3"
    assert prefill.split()[:5] == ["p0", "prefill", "ready", "m", "h:1"]
    assert prefill.endswith("2.0 KiB")
    assert decode.split()[5:7] == ["3", "4"]
    for title, value in [("KV CAPACITY", "1.0 GiB"), ("RESERVED", "1.0 MiB"), ("ACTIVE", "7.0 MiB")]:
        assert decode[header.index(title) :].startswith(value)
    assert totals == "9 requests: KV 10.0 GiB full, 1.0 GiB kept, 1.0 GiB sent, 9.0 GiB saved (90.0 %)"


def test_status_json_is_one_line(busy_service, vlcache):
    exit_code, out, _ = vlcache("status", "--json")
    (line,) = out.splitlines()
    status = json.loads(line)
    assert exit_code == 0
    assert status["workers"][1]["kv"]["filling"] == 5 * 2**20
    assert status["totals"]["kv_saved_bytes"] == 9 * 2**30


def test_status_of_a_service_that_has_done_nothing(service, vlcache):
    exit_code, out, _ = vlcache("status")
    assert exit_code == 0
    assert out.splitlines()[-1] == "0 requests: KV 0 B full, 0 B kept, 0 B sent, 0 B saved (-)"


def test_ctrl_c_cancels_the_request(service):
    service.attempts = [[started(), delta("a", 1), service.hang]]
    command = [sys.executable, "-W", "error", "-m", "vlcache.cli", "ask", "--address", service.address, "Which?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(1) == "a"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "\n", "")
    assert service.cancelled.wait(5)


def test_the_command_needs_a_subcommand():
    done = subprocess.run([sys.executable, "-m", "vlcache.cli"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "command" in done.stderr


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (10 * 2**30, "10.0 GiB"),
        (3 * 2**60, "3072.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_have_one_form(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_columns_are_aligned():
    assert format_table(["A", "LONG"], [["long", "b"], ["c", "d"]]) == "A     LONG\nlong  b\nc     d"
    assert format_table(["A", "B"], []) == "A  B"


def test_every_command_documents_itself(capsys):
    for command in ("ask", "bench", "chat", "explain", "status"):
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        assert "--address" in capsys.readouterr().out
