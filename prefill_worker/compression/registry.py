"""The policies by name, and how a request's parameters become one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_type_hints

from prefill_worker.compression.policies.ada_kv import AdaKV
from prefill_worker.compression.policies.air_cache import AirCache
from prefill_worker.compression.policies.cake import Cake
from prefill_worker.compression.policies.d2o import D2O
from prefill_worker.compression.policies.elastic_cache import ElasticCache
from prefill_worker.compression.policies.expected_attention import ExpectedAttention
from prefill_worker.compression.policies.fast_gen import FastGen
from prefill_worker.compression.policies.fast_v import FastV
from prefill_worker.compression.policies.h2o import H2O
from prefill_worker.compression.policies.keyformer import Keyformer
from prefill_worker.compression.policies.kv_merger import KVMerger
from prefill_worker.compression.policies.kv_sharer import KVSharer
from prefill_worker.compression.policies.look_ahead import LookAheadPolicy
from prefill_worker.compression.policies.look_m import LookM
from prefill_worker.compression.policies.mix_kv import MixKV
from prefill_worker.compression.policies.prefix_kv import PrefixKV
from prefill_worker.compression.policies.pyramid_kv import PyramidKV
from prefill_worker.compression.policies.random_tokens import RandomTokens
from prefill_worker.compression.policies.scope import Scope
from prefill_worker.compression.policies.snap_kv import SnapKV
from prefill_worker.compression.policies.streaming_llm import StreamingLLM
from prefill_worker.compression.policies.tgv_kv import TGVKV
from prefill_worker.compression.policies.tidal_decode import TidalDecode
from prefill_worker.compression.policies.vl_cache import VLCache
from prefill_worker.compression.policies.zip_vl import ZipVL
from prefill_worker.compression.policy import Policy, parameters_of
from shared.errors import InvalidRequestError

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        VLCache,
        StreamingLLM,
        SnapKV,
        AirCache,
        TGVKV,
        MixKV,
        ExpectedAttention,
        H2O,
        PyramidKV,
        PrefixKV,
        Cake,
        AdaKV,
        FastGen,
        RandomTokens,
        ElasticCache,
        LookM,
        D2O,
        KVMerger,
        Keyformer,
        FastV,
        ZipVL,
        LookAheadPolicy,
        Scope,
        TidalDecode,
        KVSharer,
    )
}
DEFAULT_POLICY = VLCache.name
# The winner of the quality table: may become another policy when a better one is found.
RECOMMENDED = "recommended"
CHOICES: dict[str, type[Policy]] = {**POLICIES, RECOMMENDED: LookAheadPolicy}
"""Every name that a request may give."""


def build_policy(name: str, parameters: Mapping[str, object]) -> Policy:
    """A policy with a request's parameters.

    Args:
        name: Empty means the default.
        parameters: JSON values by name.

    Raises:
        InvalidRequestError: Unknown policy or parameter, or a value of the wrong type or range.
    """
    policy = CHOICES.get(name or DEFAULT_POLICY)
    if policy is None:
        known = ", ".join(sorted(CHOICES))
        raise InvalidRequestError(f"unknown policy {name!r}; known: {known}", reason="UNKNOWN_POLICY")
    types = get_type_hints(policy)
    known_fields = [field.name for field in parameters_of(policy)]
    values = {}
    for key, value in parameters.items():
        if key not in known_fields:
            raise InvalidRequestError(
                f"{policy.name} has no parameter {key!r}; it has {', '.join(known_fields)}", reason="POLICY_PARAMETER"
            )
        values[key] = _converted(policy.name, key, value, types[key])
    return policy(**values)


def _converted(policy: str, key: str, value: object, wanted: type) -> object:
    """JSON knows only floats: whole ones become the integers that were meant; a bool is never a number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if wanted is float or (wanted is int and float(value).is_integer()):
            return wanted(value)
    elif wanted in (str, bool) and isinstance(value, wanted):
        return value
    raise InvalidRequestError(f"{policy}: {key} must be a {wanted.__name__}, not {value!r}", reason="POLICY_PARAMETER")
