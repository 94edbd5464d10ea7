"""What operators see: metrics of every process, health, reflection, and totals that add up."""

from __future__ import annotations

import grpc
import vlcache
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.running_stack import RunningStack


def samples_of(text: str, name: str) -> list[float]:
    lines = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return [float(line.rsplit(" ", 1)[1]) for line in lines]


def test_every_process_shows_its_metrics(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        client.generate("Hello", sampling=vlcache.Sampling(max_new_tokens=4, ignore_eos=True))
    memory_stack.wait_idle()
    router, prefill, decode = (memory_stack.metrics(role) for role in ("router", "prefill", "decode"))
    for name in ("time_to_first_token_seconds_count", "time_to_second_token_seconds_count", "requests_total"):
        assert sum(samples_of(router, f"vlcache_{name}")) >= 1, name
    for name in ("kv_transfer_bytes_total", "kv_transfer_seconds_count", "kv_kept_attention_mass_ratio_count"):
        assert sum(samples_of(prefill, f"vlcache_{name}")) >= 1, name
    assert sum(samples_of(decode, "vlcache_decode_step_seconds_count")) >= 3
    for text in (prefill, decode):
        assert sum(samples_of(text, "vlcache_kv_resident_bytes")) == 0
    assert 'stage="install"' in decode
    assert 'stage="statistics"' in prefill


def test_totals_are_the_sum_of_the_answers(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        before = client.info().totals
        answers = [
            client.generate("Hello " * n, sampling=vlcache.Sampling(max_new_tokens=2, ignore_eos=True))
            for n in (1, 20, 40)
        ]
        after = client.info().totals
    assert after.requests - before.requests == 3
    assert after.kv_full_bytes - before.kv_full_bytes == sum(a.compression.full_bytes for a in answers)
    assert after.kv_sent_bytes - before.kv_sent_bytes == sum(a.transfer.sent_bytes for a in answers)


def test_health_and_reflection(memory_stack: RunningStack) -> None:
    with grpc.insecure_channel(memory_stack.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(stub.ServerReflectionInfo(iter([request]), timeout=10)))
    names = {service.name for service in answer.list_services_response.service}
    assert "vlcache.v1.InferenceService" in names


def test_the_model_describes_itself(memory_stack: RunningStack) -> None:
    with memory_stack.client() as client:
        (model,) = client.models()
        info = client.info()
    assert model.name == "shapes-vlm"
    assert "vl_cache" in model.policies
    assert {worker.role for worker in info.workers} == {"prefill", "decode"}
    assert all(worker.state == "ready" for worker in info.workers)
