"""Policy: a YAML document, compiled once, that judges operations. Pure; only `model` and `documents` are used."""

from sidecar.policy.compile import builtin_policy, load_policy
from sidecar.policy.engine import Policy

__all__ = ["Policy", "builtin_policy", "load_policy"]
