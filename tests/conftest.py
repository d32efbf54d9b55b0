"""One thread, a stable hypothesis profile, and the helpers of `tests/reference` on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).parent / "reference"))
torch.set_num_threads(1)
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("bmojo", deadline=None, derandomize=True, max_examples=20, suppress_health_check=quiet)
# pytest --hypothesis-profile=search: a long random search, for whoever changed the semantics
settings.register_profile("search", deadline=None, max_examples=400, suppress_health_check=quiet)
# pytest --hypothesis-profile=mutation: a few examples of each, for a run of the suite on every mutant
few = [Phase.explicit, Phase.generate]
settings.register_profile("mutation", settings.get_profile("bmojo"), max_examples=4, phases=few)
settings.load_profile("bmojo")


def pytest_collection_modifyitems(items):
    """What lowers a program comes last in its process: torchax, once imported, gives PyTorch's compilers a device
    called jax that they do not know."""
    items.sort(key=lambda item: "lower" in item.path.name)
