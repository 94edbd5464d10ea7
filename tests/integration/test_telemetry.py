"""What a stack of real processes tells of its requests while it serves them: one trace over all services, and logs."""

from __future__ import annotations

import itertools
import json
import socket
import time
from dataclasses import dataclass, field, replace

import pytest
import vlcache
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from deploy.local.forks import Forks
from models.shapes_vlm.paths import SAMPLES
from tests.integration.conftest import stack_config
from tests.integration.otlp_receiver import OtlpReceiver, SeenSpan
from tests.integration.running_stack import RunningStack

IMAGE = (SAMPLES / "scene_1.png").read_bytes()
ROUTER, PREFILL, DECODE = "vlcache-router", "vlcache-prefill", "vlcache-decode"
STAGES = {
    "Generate": ["admit"],
    "Prefill": ["preprocess", "prefill_queue", "vision_encode", "prefill", "statistics", "select", "transfer"],
    "sequence": ["install", "decode_queue", "decode"],
}
# The clocks of the processes of one machine are one, but a thread may be late to see that a call or a stage has ended.
LATE_S = 0.05
SHORT = vlcache.Sampling(max_new_tokens=12, ignore_eos=True)
LONG = vlcache.Sampling(max_new_tokens=400, ignore_eos=True)
# In prompts alone; nobody may repeat it.
CANARY = "canary-7f3a"
KEYS = {"time", "level", "service", "logger", "message"}
OPTIONAL_KEYS = {"request_id", "trace_id", "details", "exception"}


class Caller:
    """A program with OpenTelemetry of its own, in a span of its own."""

    def __enter__(self) -> Caller:
        self._active = TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("mine")
        context = self._active.__enter__().get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id)
        self.span_id = trace.format_span_id(context.span_id)
        return self

    def __exit__(self, *error: object) -> None:
        self._active.__exit__(*error)


def wait_for_workers(client: vlcache.Client, number: int) -> None:
    """Until the router sees so many."""
    give_up = time.monotonic() + 30
    client.wait_ready(30)
    while [worker.state for worker in client.info().workers] != ["ready"] * number:
        assert time.monotonic() < give_up
        time.sleep(0.05)


@dataclass
class Told:
    """What was answered, and what was told of it until the last process had ended."""

    answers: dict[str, vlcache.Completion] = field(default_factory=dict)
    callers: dict[str, Caller] = field(default_factory=dict)
    errors: dict[str, vlcache.VlcacheError] = field(default_factory=dict)
    lost: str = ""
    """Name of the decode worker that was killed."""
    spans: list[SeenSpan] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)

    def trace(self, request_id: str) -> list[SeenSpan]:
        """The spans of one request, by their beginnings."""
        (root,) = [span for span in self.spans if span.attributes.get("request_id") == request_id and not_a_child(span)]
        return sorted((span for span in self.spans if span.trace_id == root.trace_id), key=lambda span: span.start_s)

    def read_logs(self, stack: RunningStack) -> None:
        """Adds what the processes have logged since they were started."""
        for log in stack.log_dir.glob("*.log"):
            self.logs[log.stem] = self.logs.get(log.stem, "") + log.read_text()

    def lines(self, service: str) -> list[dict[str, object]]:
        """The log of one process."""
        return [json.loads(line) for line in self.logs[service].splitlines()]


def not_a_child(span: SeenSpan) -> bool:
    return span.name == "Generate"


def one(spans: list[SeenSpan], name: str) -> SeenSpan:
    (span,) = [span for span in spans if span.name == name]
    return span


@pytest.fixture(scope="module")
def told(forks: Forks) -> Told:
    """A few requests, the last of which loses its worker. The processes send what is left when they end."""
    told = Told()
    with OtlpReceiver() as receiver:
        flags = ("--otlp-endpoint", receiver.address, "--log-format", "json", "--log-level", "DEBUG")
        config = stack_config("auto", decode_workers=2)
        config = replace(config, worker_flags=(*config.worker_flags, *flags), router_flags=flags)
        with RunningStack(config, forks) as stack, stack.client() as client:
            ask(told, client)
            fail(told, client)
            stack.wait_idle()
            told.read_logs(stack)
            # a process that is killed takes with it what it has not sent, which is no more than a few seconds'
            assert stack.restart("router", "prefill-0", "decode-0", "decode-1") == [0, 0, 0, 0]
            wait_for_workers(client, 3)
            lose(told, stack, client)
            told.read_logs(stack)
        told.spans = receiver.spans()
    return told


def ask(told: Told, client: vlcache.Client) -> None:
    """One as a whole within a span of the caller's, one as a stream, which has no parent."""
    with Caller() as told.callers["whole"]:
        told.answers["whole"] = client.generate(
            f"What is it? {CANARY}", images=[IMAGE], sampling=SHORT, request_id="whole"
        )
    with client.stream("Go on", images=[IMAGE], sampling=SHORT, request_id="stream") as stream:
        told.answers["stream"] = stream.result()


def fail(told: Told, client: vlcache.Client) -> None:
    """Refused by the router, too long as the prefill worker finds, and with an image that cannot be read."""
    for request_id, prompt, images, model in (
        ("refused", f"What is it? {CANARY}", [], "nobody"),
        ("long", f"{CANARY} " * 100_000, [], ""),
        ("broken", f"What is it? {CANARY}", [IMAGE[:60] + CANARY.encode() + IMAGE[72:]], ""),
    ):
        with pytest.raises(vlcache.VlcacheError) as failure:
            client.generate(prompt, images=images, sampling=SHORT, request_id=request_id, model=model)
        told.errors[request_id] = failure.value


def lose(told: Told, stack: RunningStack, client: vlcache.Client) -> None:
    """Kills the decode worker that the answer comes from."""
    with client.stream("Go on", images=[IMAGE], sampling=LONG, request_id="lost") as stream:
        for number, event in enumerate(stream):
            if isinstance(event, vlcache.Delta) and number > 8:
                break
        infos = {info.name: info.requests_running for info in stack.worker_infos("decode")}
        (told.lost,) = [name for name, running in infos.items() if running]
        stack.kill(told.lost)
        told.answers["lost"] = stream.result()


def check_tree(spans: list[SeenSpan]) -> None:
    """Every parent is there, and children lie within it."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start_s <= span.end_s
        if not_a_child(span):
            continue
        parent = by_id[span.parent_id]
        assert parent.start_s - LATE_S <= span.start_s, (parent, span)
        assert span.end_s <= parent.end_s + LATE_S, (parent, span)


@pytest.mark.parametrize("request_id", ["whole", "stream"])
def test_an_answer_is_one_tree_of_spans(told: Told, request_id: str) -> None:
    spans = told.trace(request_id)
    check_tree(spans)
    root = one(spans, "Generate")
    for service, call in ((ROUTER, "Generate"), (PREFILL, "Prefill"), (DECODE, "sequence")):
        parent = one(spans, call)
        assert (parent.service, parent.error) == (service, "")
        assert call == "Generate" or parent.parent_id == root.span_id
        stages = [one(spans, name) for name in STAGES[call]]
        assert all((each.service, each.parent_id) == (service, parent.span_id) for each in stages)
        assert all(before.start_s <= after.start_s + LATE_S for before, after in itertools.pairwise(stages))
    assert len(spans) == len(STAGES) + sum(map(len, STAGES.values()))


def test_a_trace_goes_on_that_of_the_caller(told: Told) -> None:
    caller, root = told.callers["whole"], one(told.trace("whole"), "Generate")
    assert (root.trace_id, root.parent_id) == (caller.trace_id, caller.span_id)
    assert one(told.trace("stream"), "Generate").parent_id == ""


def test_spans_say_what_was_done(told: Told) -> None:
    answer, spans = told.answers["whole"], told.trace("whole")
    root, compression = one(spans, "Generate").attributes, answer.compression
    assert (root["model"], root["tenant"], root["policy"]) == ("shapes-vlm", "default", "vl_cache")
    assert (root["outcome"], root["code"], root["failovers"]) == ("finished", "OK", 0)
    assert (root["prefill_worker"], root["decode_worker"]) == ("prefill-0", answer.placement.decode_worker)
    assert root["retention_asked"] == pytest.approx(0.1)
    assert root["retention"] == pytest.approx(compression.realised_retention)
    assert (root["kv_full_bytes"], root["kv_kept_bytes"]) == (compression.full_bytes, compression.kept_bytes)
    assert (root["kv_sent_bytes"], root["transport"]) == (answer.transfer.sent_bytes, answer.transfer.transport)
    assert (root["generated_tokens"], root["prompt_tokens"]) == (12, answer.usage.prompt_tokens)
    transfer, select = one(spans, "transfer").attributes, one(spans, "select").attributes
    assert (transfer["transport"], transfer["sent_bytes"]) == ("memory", answer.transfer.sent_bytes)
    assert select["kv_kept_bytes"] == compression.kept_bytes
    assert [name for name, _ in one(spans, "Generate").events] == ["first_token"]
    assert one(spans, "decode").attributes["generated_tokens"] == 12


def test_a_failover_shows(told: Told) -> None:
    """What the killed worker would have sent is lost with it; everybody else's is there."""
    spans, placement = told.trace("lost"), told.answers["lost"].placement
    check_tree(spans)
    root, resend, sequence = (one(spans, name) for name in ("Generate", "Resend", "sequence"))
    ((_, failover),) = [event for event in root.events if event[0] == "failover"]
    assert failover == {"kind": "resend", "reason": "DECODE_WORKER_LOST", "worker": told.lost}
    assert (root.attributes["failovers"], root.attributes["decode_worker"]) == (1, placement.decode_worker)
    assert resend.parent_id == sequence.parent_id == root.span_id
    assert (sequence.instance, resend.attributes["request_id"]) == (placement.decode_worker, "lost")
    first, second = (span for span in spans if span.name == "transfer")
    assert (first.attributes["decode_worker"], second.attributes["decode_worker"]) == (told.lost, sequence.instance)
    assert second.parent_id == resend.span_id
    assert len([span for span in spans if span.name == "admit"]) == 2
    assert one(spans, "replay").parent_id == one(spans, "decode").parent_id == sequence.span_id


def test_failures_are_those_of_their_spans(told: Told) -> None:
    (refused,) = told.trace("refused")
    assert (refused.error, refused.attributes["outcome"]) == ("NOT_FOUND", "refused")
    for request_id, code in (("long", "OUT_OF_RANGE"), ("broken", "INVALID_ARGUMENT")):
        spans = told.trace(request_id)
        assert told.errors[request_id].code.name == code
        assert one(spans, "Generate").error == one(spans, "Prefill").error == code
        # its reservation was released, which is no failure of the decode worker
        assert one(spans, "sequence").error == ""


def test_every_line_is_json_with_the_documented_keys(told: Told) -> None:
    assert {"router", "prefill-0", "decode-0", "decode-1"} <= told.logs.keys()
    for service in told.logs:
        for line in told.lines(service):
            assert line.keys() >= KEYS
            assert line.keys() <= KEYS | OPTIONAL_KEYS
            assert line["service"] in (service, "preprocess")


def test_one_line_per_request_says_how_it_ended(told: Told) -> None:
    lines = {line["request_id"]: line for line in told.lines("router") if line["logger"] == "router.access"}
    assert list(lines) == ["whole", "stream", "refused", "long", "broken", "lost"]
    ended = {request_id: line["details"] for request_id, line in lines.items()}
    for request_id in lines:
        assert lines[request_id]["trace_id"] == told.trace(request_id)[0].trace_id
    whole, answer = ended["whole"], told.answers["whole"]
    assert (whole["outcome"], whole["code"], whole["generated_tokens"]) == ("finished", "OK", 12)
    assert (whole["kv_kept_bytes"], whole["decode_worker"]) == (
        answer.compression.kept_bytes,
        answer.placement.decode_worker,
    )
    assert 0 < whole["first_token_s"] < whole["total_s"]
    assert (ended["refused"]["outcome"], ended["refused"]["code"]) == ("refused", "NOT_FOUND")
    assert (ended["broken"]["outcome"], ended["broken"]["code"]) == ("failed", "INVALID_ARGUMENT")
    assert ended["lost"]["failovers"] == 1


def test_nothing_of_a_prompt_is_logged(told: Told) -> None:
    assert all(CANARY not in log for log in told.logs.values())
    assert not [span for span in told.spans if CANARY in repr(span)]


def test_a_receiver_that_is_down_disturbs_nobody(forks: Forks) -> None:
    """It takes connections and never says a word, which is the worst that it can do."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        flags = ("--otlp-endpoint", f"127.0.0.1:{silent.getsockname()[1]}")
        config = stack_config("auto")
        config = replace(config, worker_flags=(*config.worker_flags, *flags), router_flags=flags)
        with RunningStack(config, forks) as stack:
            with stack.client() as client:
                answers = [client.generate("Go on", sampling=SHORT) for _ in range(3)]
            stack.wait_idle()
            stopping = time.monotonic()
        assert time.monotonic() - stopping < config.drain_s
    assert {len(answer.token_ids) for answer in answers} == {12}
    assert stack.clean, "a process did not end with exit code 0"
