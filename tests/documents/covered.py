"""Who runs each command of the documents, and why some are not run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.documents.pages import Command

HERE = "tests/documents/test_commands_run.py"
BENCHMARKS = "tests/unit/benchmarks"
CHECKPOINT = "tests/unit/models/test_checkpoint.py"
KUBERNETES = "tests/unit/deploy/kubernetes"
WHEELS = "tests/integration/test_wheels.py"
CONTAINERS = "tests/containers/test_compose.py"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Commands that begin like `pattern` on pages like `page` are taken care of `by` a file or a folder of tests.

    `why` says why they are not run as they are written; it is empty where they are.
    """

    pattern: str
    by: str
    why: str = ""
    page: str = ""

    def holds(self, command: Command) -> bool:
        """Whether it speaks of the command."""
        return bool(re.match(self.pattern, command.text)) and bool(re.search(self.page, command.page))


# The first one that holds counts.
RULES = (
    # Of the client: as they are written, against a real service.
    Rule(pattern=r"vlcache serve", by=HERE),
    Rule(pattern=r"vlcache status --watch", by="tests/unit/client/test_watch.py", why="needs a terminal, and ctrl-C"),
    Rule(pattern=r"vlcache", page=r"client/README", by="tests/integration/test_command_line.py"),
    Rule(pattern=r"eval ", by="tests/unit/client/test_completion.py", why="changes the reader's shell"),
    Rule(pattern=r"vlcache certs certs --hosts router", by=HERE),
    Rule(pattern=r"vlcache|export", page=r"security", by="tests/unit/test_security_page.py"),
    Rule(pattern=r"vlcache", by=HERE),
    Rule(pattern=r"curl", by=HERE),
    # Of the services.
    Rule(
        pattern=r"python -m (prefill_worker|decode_worker|router)\b",
        page=r"security",
        by="tests/unit/test_security_page.py",
        why="flags and certificates are read; the services run in tests/integration/test_secure_stack.py",
    ),
    Rule(
        pattern=r"python -m (prefill_worker|decode_worker|router|deploy\.combined)( |$)",
        by="tests/documents/test_commands.py",
        why="flags are parsed; every stack of tests/integration is made of these processes",
    ),
    Rule(pattern=r"python -m deploy\.local", by=HERE, why="the same program as `vlcache serve`, which is run"),
    Rule(pattern=r"python -m shared\.rpc\.probe", by="tests/unit/shared/test_probe.py"),
    Rule(
        pattern=r"python -m deploy\.ui_picture",
        by="tests/integration/test_ui.py",
        why="needs a browser, as the page's tests",
    ),
    Rule(pattern=r"python -m deploy\.grafana\.picture", by="tests/documents/test_commands.py", why="needs a browser"),
    Rule(
        pattern=r"python -m prefill_worker\.compression\.catalogue",
        by="tests/unit/prefill_worker/compression/test_catalogue.py",
        why="writes into docs/",
    ),
    Rule(
        pattern=r"python -m prefill_worker\.calibrate",
        by="tests/unit/prefill_worker/test_kv_sharer.py",
        why="what it computes is tested there; it writes beside the weights",
    ),
    # Minutes to hours with their own settings: the same `main` with the smallest ones, and these flags are parsed.
    Rule(
        pattern=r"python -m benchmarks\.chaos",
        by="tests/chaos/test_decode_worker.py",
        why="minutes; make chaos kills the same processes, and its figures have tests of their own",
    ),
    Rule(
        pattern=r"(\.venv/bin/)?python -m benchmarks\.kept_sets",
        by="tests/unit/benchmarks/test_kept_sets.py",
        why="what it computes runs there; it writes a folder for another program",
    ),
    Rule(
        pattern=r"python -m benchmarks\.prefill_pieces",
        by="tests/unit/benchmarks/test_prefill_pieces.py",
        why="minutes; its measurement runs there with the least",
    ),
    Rule(pattern=r"python -m benchmarks\.", by=BENCHMARKS, why="minutes; run there with the least"),
    Rule(
        pattern=r"\.\./kvpress|python3 -m venv", by="tests/unit/benchmarks/test_kept_sets.py", why="another project's"
    ),
    Rule(pattern=r"python -m models\.shapes_vlm\.training", by="tests/unit/models/test_training.py", why="hours"),
    Rule(pattern=r"python -m models\.shapes_vlm\.evaluate", by=CHECKPOINT, why="an hour; its answerer runs there"),
    Rule(pattern=r"python -m models\.shapes_vlm\.make_samples", by=CHECKPOINT, why="writes into models/"),
    # Doors: that they exist, and that what they start takes its flags.
    Rule(pattern=r"make serve", by=HERE, why="with other ports, and without setting up"),
    Rule(pattern=r"make ", by="tests/documents/test_commands.py", why="dry; CI calls these targets themselves"),
    # Of others.
    Rule(pattern=r"docker build", by="tests/unit/deploy/test_dockerfile.py", why="make test-containers builds it"),
    Rule(pattern=r"docker ", page=r"security", by="tests/containers/test_secure_compose.py", why="by Podman"),
    Rule(pattern=r"docker ", by=CONTAINERS, why="by Podman: make test-containers"),
    Rule(pattern=r"podman ", by="tests/containers/test_kube_play.py", why="make test-containers"),
    Rule(pattern=r"kubectl (apply|drain|-n vlcache)", by=KUBERNETES, why="there is no cluster; names are held there"),
    Rule(
        pattern=r"(\S+/)?pip install", by=WHEELS, why="installs; extras are looked up, and both wheels installed there"
    ),
    Rule(pattern=r"promtool", by="tests/unit/deploy/test_dashboard_files.py"),
    Rule(pattern=r"guidellm", by="tests/integration/test_load_tool.py", why="where it is installed"),
    Rule(pattern=r"(vllm|python -m lmms_eval)", by="tests/integration/test_openai.py", why="said to be not run here"),
    Rule(pattern=r"(apt|sudo|echo|source) ", by=CONTAINERS, why="set up the reader's machine or shell"),
)


def rule_of(command: Command) -> Rule | None:
    """Who takes care of a command."""
    return next((rule for rule in RULES if rule.holds(command)), None)


def names_a_test(path: Path) -> bool:
    """Whether there are tests: a file of them, or a folder with some."""
    return path.is_file() if path.suffix else any(path.rglob("test_*.py"))
