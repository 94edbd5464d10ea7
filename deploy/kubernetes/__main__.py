"""`python -m deploy.kubernetes`: writes the alert rules as the Prometheus operator takes them."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

RULES = Path(__file__).parents[1] / "prometheus" / "rules.yml"
RESOURCE = Path(__file__).parent / "components" / "monitoring" / "prometheus_rule.yaml"

HEADER = """\
# Written by `make docs` from deploy/prometheus/rules.yml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vlcache
  namespace: vlcache
spec:
"""


def as_resource(rules: str) -> str:
    """A PrometheusRule with the groups of a rules file, its comments included."""
    return HEADER + textwrap.indent(rules, "  ")


def main() -> int:
    """Writes the resource; returns the exit code."""
    RESOURCE.write_text(as_resource(RULES.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
