"""The load generator against three real processes."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.serve.__main__ import main
from tests.integration.running_stack import RunningStack

FLAGS = ["--num-prompts", "4", "--warmup", "1", "--concurrency", "2", "--max-new-tokens", "5", "--tasks", "read"]


def test_a_handful_of_requests_at_two_retentions(memory_stack: RunningStack, tmp_path: Path) -> None:
    target = tmp_path / "serve.json"
    assert main(["--address", memory_stack.address, *FLAGS, "--goodput", "e2el:100000", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    full, kept = found["results"]
    for row in (full, kept):
        assert row["failed_by_code"] == {}
        assert (row["completed"], row["failed"], row["total_output_tokens"]) == (4, 0, 20)
        assert row["request_goodput"] == row["request_throughput"] > 0
        assert 0 < row["mean_ttft_ms"] < row["mean_ttst_ms"] < row["mean_e2el_ms"]
        assert row["mean_tpot_ms"] > 0
    assert full["kv_full_bytes"] == full["kv_kept_bytes"] == kept["kv_full_bytes"]
    assert kept["kv_sent_bytes"] < 0.11 * full["kv_sent_bytes"]
    assert kept["kv_saved_bytes"] > 0.89 * kept["kv_full_bytes"]
    memory_stack.wait_idle()
