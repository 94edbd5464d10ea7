"""Checkpoints are made once per session; pytest runs all tests of a family before the next one's."""

from __future__ import annotations

import pytest
import torch

from shared.model.loading import load_decode_model
from tests.families.catalogue import FAMILIES
from tests.families.family import Family
from tests.families.loaded import Loaded, load
from tests.families.oracle import Oracle
from tests.families.prefilling import CPU, Prefilling
from tests.unit.decode_worker.test_engine import Recorded


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def loaded(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(family.name)
    family.save(folder)
    return load(folder)


@pytest.fixture(scope="session")
def prefilling(loaded: Loaded) -> Prefilling:
    return Prefilling(loaded)


@pytest.fixture(scope="session")
def decoder(loaded: Loaded) -> Recorded:
    return Recorded(load_decode_model(loaded.folder, dtype=torch.float32, device=CPU))


@pytest.fixture(scope="session")
def oracle(loaded: Loaded) -> Oracle:
    return Oracle(loaded)
