"""The operators' page lists what there is."""

from __future__ import annotations

import re

import pytest

from deploy.operations import BEGIN, END, PAGE, with_metrics

# What operators of such systems look for, by its name.
EXPECTED = (
    "time_to_first_token_seconds",
    "time_to_second_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "stage_seconds",
    "requests_total",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_ratio",
    "kv_bytes_full_total",
    "kv_bytes_sent_total",
    "kv_bytes_saved_total",
    "kv_retention_ratio",
    "kv_kept_attention_mass_ratio",
    "kv_layer_retention_ratio",
    "kv_resident_bytes",
    "kv_orphan_bytes",
    "kv_transfer_seconds",
    "kv_transfer_bytes_total",
    "kv_transfer_failures_total",
    "kv_resend_total",
    "lease_expired_total",
    "reservation_wait_seconds",
    "reservation_rejected_total",
    "cancellations_total",
    "worker_state",
    "circuit_state",
    "worker_heartbeat_age_seconds",
    "event_loop_delay_seconds",
    "visual_tokens",
    "image_pixels",
    "prompt_tokens_total",
    "generation_tokens_total",
    "build_info",
)


def test_the_committed_page_is_what_the_code_writes() -> None:
    page = PAGE.read_text()
    assert with_metrics(page) == page, "run `make docs`"


@pytest.mark.parametrize("name", EXPECTED)
def test_what_operators_look_for_is_listed(name: str) -> None:
    _, _, table = PAGE.read_text().partition(BEGIN)
    assert f"| `vlcache_{name}` |" in table


def test_metrics_that_the_text_names_exist() -> None:
    text, _, table = PAGE.read_text().partition(BEGIN)
    named = set(re.findall(r"vlcache_\w+", text))
    assert len(named) > 10
    assert named <= set(re.findall(r"vlcache_\w+", table))


@pytest.mark.parametrize("page", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="needs one"):
        with_metrics(page)


def test_what_lies_around_the_table_stays() -> None:
    page = with_metrics(f"before {BEGIN}old{END} after")
    assert page.startswith(f"before {BEGIN}\n| metric |")
    assert page.endswith(f"|\n{END} after")
    assert "old" not in page
    assert with_metrics(page) == page
