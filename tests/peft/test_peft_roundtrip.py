"""Train, save, load in a new process: the outputs are equal bit for bit, on five architectures and both residuals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft_tiny_models
import pytest
import torch
from peft import get_peft_model
from peft_tiny_models import MODELS, TARGETS, batch, loss_of, outputs_of

import goat_kernels
from goat_kernels.peft import GoatConfig

CASES = {
    "llama": {},
    "gpt2": {},
    "bert": {},
    "vit": {},
    "clip": {},
    "llama-fold": {"residual": "fold"},
    "gpt2-fold": {"residual": "fold", "scaling": "goat_s"},
    "llama-hydralora": {"init": "hydralora", "rank_pattern": {"q_proj": 4}},
}

# What the new process runs: no SVD is allowed there, and each adapter is loaded in each of the ways there are.
LOADER = """
import sys
import torch
torch.set_num_threads(1)
import goat_kernels.peft
from peft import PeftModel
from packaging import version
import transformers
from peft_tiny_models import MODELS, batch, outputs_of

def refuse(*args, **kwargs):
    raise AssertionError("loading ran an SVD")

torch.linalg.svd = refuse

def check(case, how, model):
    with torch.no_grad():
        found = outputs_of(model.eval()(**batch(case.split("-")[0], seed=7)))
    expected = torch.load(f"{sys.argv[1]}/{case}/expected.pt")
    assert torch.equal(found, expected), f"{case}, {how}: off by {(found - expected).abs().max()}"

for case in sys.argv[2:]:
    folder, build = f"{sys.argv[1]}/{case}", MODELS[case.split("-")[0]]
    check(case, "PEFT", PeftModel.from_pretrained(build(), folder))
    check(case, "low_cpu_mem_usage", PeftModel.from_pretrained(build(), folder, low_cpu_mem_usage=True))
    check(case, "another name", PeftModel.from_pretrained(build(), folder, adapter_name="other"))
    # Older versions of load_adapter miss the modules_to_save of any method ("classifier" of BERT and ViT).
    if case.split("-")[0] not in ("bert", "vit") or version.parse(transformers.__version__).release >= (5, 23):
        model = build()
        model.load_adapter(folder)
        check(case, "transformers", model)
    print("equal:", case)
"""


def train(case: str, folder: Path) -> None:
    """20 steps from random weights; writes the adapter and the outputs on another batch."""
    name = case.split("-")[0]
    model = get_peft_model(
        MODELS[name](), GoatConfig(r=8, num_experts=4, target_modules="all-linear", **TARGETS[name], **CASES[case])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs = batch(name)
    losses = []
    model.train()
    for _ in range(20):
        loss = loss_of(model(**inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(folder)
    with torch.no_grad():
        torch.save(outputs_of(model.eval()(**batch(name, seed=7))), folder / "expected.pt")


@pytest.mark.long
def test_outputs_are_bit_equal_in_a_new_process(tmp_path):
    for case in CASES:
        train(case, tmp_path / case)
    tools = Path(peft_tiny_models.__file__).parent
    package = Path(goat_kernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path), *CASES],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(tools)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"equal: {case}" for case in CASES]
