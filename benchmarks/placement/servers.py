"""The workers of the simulation as they really are; routers see them through `router.workers.worker.Worker`."""

from __future__ import annotations

from collections import OrderedDict

from benchmarks.placement.trace import STEP_S, TOKENS_PER_IMAGE, Request


class PrefillServer:
    """One prompt after another, in the order of arrival; remembers some images."""

    def __init__(self, tokens_per_s: float, *, cached_images: int, hit_saves: float) -> None:
        self.tokens_per_s = tokens_per_s
        self.outstanding_tokens = 0
        self.busy_s = 0.0
        self.free_at_s = 0.0
        self.lookups = 0
        self.hits = 0
        self._cached_images = cached_images
        self._hit_saves = hit_saves
        self._images: OrderedDict[int, None] = OrderedDict()

    def service_s(self, request: Request) -> float:
        """Seconds that a prompt would take behind those that are here."""
        saved = self._hit_saves * TOKENS_PER_IMAGE * sum(image in self._images for image in set(request.images))
        return (request.prompt_tokens - saved) / self.tokens_per_s

    def admit(self, request: Request, now_s: float) -> tuple[float, float]:
        """When its prompt begins and ends."""
        service_s, begin_s = self.service_s(request), max(now_s, self.free_at_s)
        self._remember(request)
        self.outstanding_tokens += request.prompt_tokens
        self.busy_s += service_s
        self.free_at_s = begin_s + service_s
        return begin_s, self.free_at_s

    def done(self, request: Request) -> None:
        """Its prompt has ended."""
        self.outstanding_tokens -= request.prompt_tokens

    def _remember(self, request: Request) -> None:
        for image in request.images:
            self.lookups += 1
            self.hits += image in self._images
            self._images[image] = None
            self._images.move_to_end(image)
        while len(self._images) > self._cached_images:
            self._images.popitem(last=False)


class DecodeServer:
    """Memory for sequences, counted in tokens; slower the fuller it is."""

    def __init__(self, speed: float, pool_tokens: int) -> None:
        self.pool_tokens = pool_tokens
        self.used_tokens = 0
        self._speed = speed

    def reserve(self, request: Request) -> bool:
        """Whether there was room."""
        if self.used_tokens + request.kv_tokens > self.pool_tokens:
            return False
        self.used_tokens += request.kv_tokens
        return True

    def answer_s(self, request: Request) -> float:
        """Seconds from the hand-over to the last token: steps read memory, so a full pool takes twice as long."""
        return request.new_tokens * STEP_S / self._speed * (0.5 + self.used_tokens / self.pool_tokens)

    def release(self, request: Request) -> None:
        """It has ended."""
        self.used_tokens -= request.kv_tokens
