"""The policies by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal

from router.placement.base import Placement
from router.placement.image_affinity import ImageAffinity
from router.placement.least_loaded import LeastLoaded
from router.placement.power_of_two import PowerOfTwo
from router.placement.round_robin import RoundRobin

PlacementName = Literal["round_robin", "least_loaded", "power_of_two", "image_affinity"]

POLICIES: dict[PlacementName, Callable[[Random], Placement]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "power_of_two": PowerOfTwo,
    "image_affinity": ImageAffinity,
}
