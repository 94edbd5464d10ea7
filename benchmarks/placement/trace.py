"""The fleet and the requests of a simulation: skewed, bursty, heavy-tailed, and the same for every policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.placement.config import PlacementConfig

# Prompt tokens per second of the slowest worker; the fastest has four times that. Sizes of pools spread as widely.
SLOWEST_TOKENS_PER_S = 1000.0
SPREAD = (1.0, 4.0)
TOKENS_PER_IMAGE = 576
NUM_IMAGES, IMAGE_WEIGHTS = (0, 1, 2, 4), (0.2, 0.5, 0.2, 0.1)
# Lognormal, as published traces of chat services are: median and sigma, cut at the last.
TEXT_TOKENS = (120, 1.3, 8000)
NEW_TOKENS = (200, 0.8, 2000)
RETENTION = 0.1
# Seconds per generated token of the slowest decode worker.
STEP_S = 0.05
# Half of the time (in stretches of this mean) requests come three times as fast as in the other half.
STRETCH_S = 4.0
BURST, LULL = 1.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request; sizes in tokens."""

    at_s: float
    router: int
    """A number that says which router it comes to, whatever their count."""
    images: tuple[int, ...]
    text_tokens: int
    new_tokens: int

    @property
    def visual_tokens(self) -> int:
        """Of all images."""
        return TOKENS_PER_IMAGE * len(self.images)

    @property
    def prompt_tokens(self) -> int:
        """Visual and text."""
        return self.visual_tokens + self.text_tokens

    @property
    def kv_tokens(self) -> int:
        """Whose KV decode holds."""
        return round(RETENTION * self.prompt_tokens) + self.new_tokens


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a run is made from."""

    prefill_tokens_per_s: Sequence[float]
    decode_speed: Sequence[float]
    """Relative to the slowest."""
    pool_tokens: Sequence[int]
    requests: Sequence[Request]


def make_trace(config: PlacementConfig) -> Trace:
    """Everything drawn from the seed."""
    chance = Random(config.seed)
    prefill = [SLOWEST_TOKENS_PER_S * chance.uniform(*SPREAD) for _ in range(config.workers)]
    decode = [chance.uniform(*SPREAD) for _ in range(config.workers)]
    drawn = [_draw(config, chance) for _ in range(config.requests)]
    mean_tokens = sum(request.prompt_tokens for request in drawn) / len(drawn)
    rate = config.load * sum(prefill) / mean_tokens
    requests = [_at(request, at_s) for request, at_s in zip(drawn, _arrivals(rate, chance), strict=False)]
    pools = _pools(config, decode, requests)
    return Trace(prefill_tokens_per_s=prefill, decode_speed=decode, pool_tokens=pools, requests=requests)


def _draw(config: PlacementConfig, chance: Random) -> Request:
    [count] = chance.choices(NUM_IMAGES, IMAGE_WEIGHTS)
    return Request(
        at_s=0.0,
        router=chance.getrandbits(32),
        images=tuple(_popular(config.images, chance) for _ in range(count)),
        text_tokens=_lognormal(TEXT_TOKENS, chance),
        new_tokens=_lognormal(NEW_TOKENS, chance),
    )


def _popular(images: int, chance: Random) -> int:
    """Zipf with exponent 1, by its continuous inverse: n with a probability of about 1 / n."""
    return int((images + 1) ** chance.random()) - 1


def _lognormal(shape: tuple[float, float, int], chance: Random) -> int:
    median, sigma, most = shape
    return max(1, min(most, round(median * chance.lognormvariate(0.0, sigma))))


def _at(request: Request, at_s: float) -> Request:
    return Request(
        at_s=at_s,
        router=request.router,
        images=request.images,
        text_tokens=request.text_tokens,
        new_tokens=request.new_tokens,
    )


def _arrivals(rate: float, chance: Random) -> Iterator[float]:
    """Poisson within stretches of random lengths, alternately fast and slow."""
    begin_s = 0.0
    for factor in itertools.cycle((BURST, LULL)):
        end_s = begin_s + chance.expovariate(1 / STRETCH_S)
        at_s = begin_s + chance.expovariate(factor * rate)
        while at_s < end_s:
            yield at_s
            at_s += chance.expovariate(factor * rate)
        begin_s = end_s


def _pools(config: PlacementConfig, speeds: Sequence[float], requests: Sequence[Request]) -> list[int]:
    """Memory in proportion to speed, so much in all that its mean use is what was asked for."""
    mean_speed = sum(speeds) / len(speeds)
    held = sum(request.kv_tokens * request.new_tokens for request in requests) * STEP_S / mean_speed
    total = held / requests[-1].at_s / config.decode_load
    largest = max(request.kv_tokens for request in requests)
    return [max(largest, round(total * speed / sum(speeds))) for speed in speeds]
