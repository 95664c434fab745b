"""How many layers hypothesis draws: the same few at every run, or many new ones with GOAT_KERNELS_TESTS=long."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# Examples take tenths of a second in Triton's interpreter; fresh data of one test serve several backends.
_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.differing_executors,
    ],
}

settings.register_profile("quick", derandomize=True, max_examples=20, phases=[Phase.generate, Phase.shrink], **_COMMON)
settings.register_profile("long", max_examples=300, print_blob=True, **_COMMON)
settings.load_profile(os.environ.get("GOAT_KERNELS_TESTS", "quick"))
