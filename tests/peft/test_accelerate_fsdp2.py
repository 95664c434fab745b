"""``accelerate launch`` with FSDP2, two gloo processes (fsdp2_on_cpu.py says what is not accelerate's own there)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft_tiny_models import batch, tiny_llama
from test_fsdp2 import COEFFICIENT, assert_equal_gradients, build, gradients
from two_processes import environment, needs_gloo

from goat_kernels.peft import GoatConfig
from goat_kernels.peft.base_layer import check_loading_of_base

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "distributed.md"


def documented(kind: str) -> str:
    """The first block of ``kind`` in docs/distributed.md."""
    return re.search(rf"```{kind}\n(.*?)```", DOCUMENT.read_text(), re.S).group(1)


def launch(script: Path, folder: Path) -> str:
    """Run ``script`` in ``folder`` with the documented settings, on two processes without a GPU."""
    settings = documented("yaml").replace("num_processes: 8", "num_processes: 2")
    assert "num_processes: 2" in settings
    (folder / "fsdp2.yaml").write_text(settings)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, "--config_file", "fsdp2.yaml", str(HERE / "fsdp2_on_cpu.py"), str(script)],
        cwd=folder,
        env={**environment(), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, _errors(done.stderr)
    return done.stdout


def _errors(text: str) -> str:
    """What rank 0 said; the launcher adds its own traceback below."""
    said = [line for line in text.splitlines() if line.startswith("[rank0]")]
    return "\n".join(said[-12:]) or text[-3000:]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerate")
    launch(HERE / "accelerate_worker.py", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], folder


@pytest.mark.long
@needs_gloo
def test_gradients_are_the_mean_of_the_ranks_own(ran):
    model = build()
    expected = gradients(model, [model(**batch("llama", seed=10 + rank)).loss / 2 for rank in range(2)])
    for found in ran[0]:
        assert_equal_gradients(found["gradients"], expected)


@pytest.mark.long
@needs_gloo
def test_saved_states_resume_with_the_same_losses(ran):
    for found in ran[0]:
        assert found["resumed"] == found["losses"]
        assert found["first loss of the adapter alone"] == found["losses"][:1]


@pytest.mark.long
@needs_gloo
def test_the_adapter_is_written_by_one_process(ran):
    reloaded = PeftModel.from_pretrained(tiny_llama().double(), ran[1] / "adapter")
    assert reloaded.peft_config["default"].balance_coefficient == COEFFICIENT


@pytest.mark.long
@needs_gloo
def test_the_documented_script(tmp_path):
    (tmp_path / "train.py").write_text(documented("python"))
    printed = launch(tmp_path / "train.py", tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("config", [{}, {"residual_coefficient": 0, "scaling": "goat_s"}], ids=["pair", "scaling"])
def test_loading_in_the_first_process_alone_is_refused(config, monkeypatch):
    """Without the refusal accelerate says: 'Tensor' object has no attribute 'device_mesh'."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading=true .* set it to false"):
        build(**config)
    build(residual_coefficient=0)  # no buffers
    monkeypatch.setenv("FSDP_VERSION", "1")
    build(**config)
    check_loading_of_base(tiny_llama())
    assert isinstance(build().peft_config["default"], GoatConfig)
