"""How many layers hypothesis draws: the same few at every run, or many new ones with GOAT_KERNELS_TESTS=long."""

from __future__ import annotations

import importlib.util
import os
import warnings

if importlib.util.find_spec("hypothesis") is None:  # a GPU machine that nothing can be installed on
    collect_ignore_glob = ["test_*.py"]
    warnings.warn("tests/hard is left out: hypothesis is not installed", stacklevel=1)
else:
    from hypothesis import HealthCheck, Phase, settings

    # Examples take tenths of a second in Triton's interpreter; fresh data of one test serve several backends.
    common = {
        "deadline": None,
        "database": None,
        "suppress_health_check": [
            HealthCheck.too_slow,
            HealthCheck.function_scoped_fixture,
            HealthCheck.differing_executors,
        ],
    }
    quick = {"derandomize": True, "max_examples": 20, "phases": [Phase.generate, Phase.shrink]}
    settings.register_profile("quick", **quick, **common)
    settings.register_profile("long", max_examples=300, print_blob=True, **common)
    settings.load_profile(os.environ.get("GOAT_KERNELS_TESTS", "quick"))
