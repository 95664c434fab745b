"""An adapter from a stranger: whatever its files say, it is refused, without memory of that size and without code."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from fault_tools import little_memory
from peft import PeftModel, get_peft_model
from peft_tiny_models import tiny_llama
from safetensors.torch import load_file, save_file

from goat_kernels.cli import main
from goat_kernels.peft import GoatConfig, GoatLinearLayer

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"


@pytest.fixture
def saved(tmp_path):
    config = GoatConfig(r=8, num_experts=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, match: str, errors=ValueError, **options) -> None:
    """Loading raises one of ``errors``, never for want of memory, and the model is as it was."""
    base = tiny_llama()
    with little_memory(), pytest.raises(errors, match=match) as caught:
        PeftModel.from_pretrained(base, folder, **options)
    assert not isinstance(caught.value, MemoryError) and "allocate" not in str(caught.value)
    assert not any(isinstance(module, GoatLinearLayer) for module in base.modules())


def edit(folder: Path, **changes) -> None:
    """Change fields of the configuration; None removes one. The digest goes, as an attacker would have it."""
    fields = json.loads((folder / CONFIG).read_text()) | {"weights_sha256": None} | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def rewrite(folder: Path, change) -> None:
    """The weights' tensors after ``change`` (of the dict, in place)."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    edit(folder)


def with_header(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)
    edit(folder)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.goat_adapter.lora_A"

HEADERS = {
    "huge-shape": {KEY: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 16]}},
    "shape-beyond-64-bits": {KEY: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
    "huge-offsets": {KEY: {"dtype": "F32", "shape": [2**32], "data_offsets": [0, 2**34]}},
    "offsets-reversed": {KEY: {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    "overlapping": {
        KEY: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        KEY + "2": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    },
    "unknown-dtype": {KEY: {"dtype": "OBJECT", "shape": [4], "data_offsets": [0, 16]}},
    "negative-shape": {KEY: {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_lies(header, saved):
    with_header(saved, json.dumps(header).encode(), bytes(16))
    refused(saved, "is no complete safetensors file")


def test_headers_that_are_no_headers(saved):
    for content in (b"\xff" * 7 + b"\x7f" + b"{}", struct.pack("<Q", 2**40) + b"{}"):
        (saved / WEIGHTS).write_bytes(content)
        edit(saved)
        refused(saved, "is no complete safetensors file")
    with_header(saved, b"[" * 100_000)
    refused(saved, "is no complete safetensors file")
    with_header(saved, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    refused(saved, "is no complete safetensors file")


def test_tensors_without_elements_but_with_a_huge_side(saved):
    huge = {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}
    with_header(saved, json.dumps({KEY: huge}).encode())
    refused(saved, r"shape \[0, 1099511627776\], but r=8")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
@pytest.mark.parametrize("tensor", ["lora_A", "router", "residual_B"])
def test_tensors_of_another_dtype(tensor, dtype, saved):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(tensor))
        tensors[key] = tensors[key].to(dtype)

    rewrite(saved, change)
    refused(saved, rf"{tensor} is of dtype")


@pytest.mark.parametrize(
    "key",
    [
        "../../../../tmp/owned.goat_adapter.lora_A",
        "/etc/passwd.goat_A",
        "a\x00b.goat_A",
        "__class__.__init__.goat_A",
        "goat_A",
        ".",
    ],
)
def test_names_are_names_of_modules_and_nothing_else(key, saved):
    def change(tensors):
        tensors[key] = tensors.pop(KEY)

    before = sorted(path.name for path in saved.parent.rglob("*"))
    rewrite(saved, change)
    refused(saved, "another base model")
    assert sorted(path.name for path in saved.parent.rglob("*")) == before


def test_a_file_without_the_adapters_tensors(saved):
    rewrite(saved, lambda tensors: (tensors.clear(), tensors.update(weight=torch.zeros(2))))
    edit(saved, r=2**30, num_experts=2, init="lora", base_weights=None)
    refused(saved, "holds no GOAT adapter")


def test_a_file_that_has_some_modules_and_a_configuration_that_is_huge_in_others(saved):
    rewrite(saved, lambda tensors: [tensors.pop(key) for key in list(tensors) if "q_proj" not in key])
    fields = {"init": "lora", "residual_coefficient": 0, "base_weights": None}
    edit(saved, **fields)
    refused(saved, "the adapter's file has nothing for its model.layers.0.self_attn.v_proj")
    edit(saved, rank_pattern={"v_proj": 2**34}, **fields)
    refused(saved, r"r=17179869184 .*v_proj.*is no adapter any more", other_base="warn")


ABSURD = {
    "huge-rank": ({"r": 2**40}, ValueError, r"but r=1099511627776 and num_experts=4"),
    "huge-number-of-experts": ({"r": 2**40, "num_experts": 2**40}, ValueError, r"num_experts=1099511627776"),
    "rank-of-a-thousand-digits": ({"r": 10**1000}, ValueError, "but r=1000"),
    "negative": ({"r": -8}, ValueError, "r=-8"),
    "text": ({"r": "8"}, TypeError, "r must be"),
    "infinite": ({"rho": float("inf")}, ValueError, "rho"),
    "not-a-number": ({"scaling": float("nan")}, ValueError, "scaling"),
    "list": ({"num_experts": [4]}, TypeError, "num_experts must be"),
    "version": ({"goat_kernels_version": "1; import os", "surprise": 1}, ValueError, "version"),
}


@pytest.mark.parametrize(("changes", "error", "match"), ABSURD.values(), ids=ABSURD.keys())
def test_a_configuration_with_absurd_values(changes, error, match, saved):
    edit(saved, **changes)
    refused(saved, match, error)


def test_a_configuration_alone_takes_no_memory_either(saved):
    (saved / WEIGHTS).unlink()
    edit(saved, r=2**34, num_experts=2, init="lora", residual_coefficient=0, base_weights=None)
    refused(saved, "r=17179869184 .*is no adapter any more")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "", "null", "\x00"], ids=lambda text: text[:4] or "empty"
)
def test_a_configuration_that_is_no_configuration(text, saved, capsys):
    (saved / CONFIG).write_text(text)
    refused(saved, "", (ValueError, TypeError, AttributeError, RecursionError))  # PEFT reads it first
    assert main(["convert", str(saved), str(saved.parent / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Payload:
    """What a malicious pickle is."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


@pytest.mark.parametrize("form", ["pickle", "torch", "named-safetensors"])
@pytest.mark.parametrize("options", [{}, {"allow_pickle": True}], ids=["default", "asked"])
def test_a_pickle_runs_nothing(form, options, saved):
    proof = saved.parent / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists(), "the payload works"
    proof.unlink()
    (saved / WEIGHTS).unlink()
    edit(saved)
    target = saved / (WEIGHTS if form == "named-safetensors" else PICKLE)
    if form == "torch":
        torch.save({KEY: Payload(proof)}, target)
    else:
        target.write_bytes(pickle.dumps({KEY: Payload(proof)}))
    base = tiny_llama()
    with little_memory(), pytest.raises((ValueError, pickle.UnpicklingError)):
        PeftModel.from_pretrained(base, saved, **options)
    assert not proof.exists()
