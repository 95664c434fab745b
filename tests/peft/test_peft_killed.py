"""A save that is killed, or that the disk or the permissions stop, leaves an adapter that loads: the old or the new."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from fault_tools import bound_by_permissions, in_child, no_file_longer_than
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft_tiny_models import tiny_llama
from safetensors import SafetensorError

from goat_kernels import files as adapter_files
from goat_kernels.peft import GoatConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

#: Audit events that come before an operation that changes files.
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


@cache
def model_of(kind: str) -> PeftModel:
    """Two adapters that no reader could take for one another: their settings and their shapes differ."""
    changes = {"old": {"r": 4, "num_experts": 2}, "new": {"r": 8, "num_experts": 4, "rho": 3.0}}[kind]
    model = get_peft_model(tiny_llama(), GoatConfig(target_modules=["q_proj", "v_proj"], **changes)).eval()
    model.add_adapter("second", GoatConfig(target_modules=["q_proj"], **changes))
    return model


def loaded_kind(folder: Path) -> str:
    """Which of the two is in ``folder``; fails unless both of its adapters load, each all old or all new."""
    kinds = []
    for name, place in (("default", folder), ("second", folder / "second")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(tiny_llama(), place)
        kind = {4: "old", 8: "new"}[loaded.peft_config["default"].r]
        assert loaded.peft_config["default"].rho == model_of(kind).peft_config[name].rho
        found = get_peft_model_state_dict(loaded)
        expected = get_peft_model_state_dict(model_of(kind), adapter_name=name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        kinds.append(kind)
    return kinds[0]


def contents(folder: Path) -> tuple:
    files = (path for path in folder.rglob("*") if path.is_file())
    return tuple(sorted((str(path.relative_to(folder)), path.read_bytes()) for path in files))


def save_killed_at(folder: Path, number: int) -> int:
    """Save the new adapter in a process that kills itself before its ``number``-th change of a file."""
    model = model_of("new")  # built here, not in every child

    def action():
        seen = 0

        def count(event, arguments):
            nonlocal seen
            if event in CHANGES and (event != "open" or _writes(arguments)):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        model.save_pretrained(folder)

    return in_child(action)


def _writes(arguments) -> bool:
    _, mode, flags = arguments
    return bool((mode and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)))


def test_a_kill_between_any_two_changes_of_a_file_leaves_the_old_or_the_new_adapter(tmp_path):
    known, kinds, number = {}, [], 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        model_of("old").save_pretrained(folder)
        status = save_killed_at(folder, number)
        after = contents(folder)
        # Names of temporary folders are random, and the adapters are few: each state is loaded once.
        key = tuple(data for _, data in after)
        known[key] = known.get(key) or loaded_kind(folder)
        kinds.append(known[key])
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert number < 100
    assert number > 8 and kinds[0] == "old" and kinds[-1] == "new"
    assert kinds == sorted(kinds, reverse=True), "old, old, ..., new, new"


def test_twenty_kills_at_random_moments_leave_the_old_or_the_new_adapter(tmp_path):
    model_of("old").save_pretrained(tmp_path / "timing")
    model, durations_s = model_of("new"), []  # built here, not in every child
    for _ in range(3):
        start = time.perf_counter()
        assert in_child(lambda: model.save_pretrained(tmp_path / "timing")) == 0
        durations_s.append(time.perf_counter() - start)
    moments = random.Random(16894)
    killed = 0
    for number in range(20):
        folder = tmp_path / str(number)
        model_of("old").save_pretrained(folder)
        child = os.fork()
        if child == 0:
            try:
                model_of("new").save_pretrained(folder)
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, min(durations_s)))
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert loaded_kind(folder) in ("old", "new")
        if number % 5 == 0:
            model_of("new").save_pretrained(folder)
            assert loaded_kind(folder) == "new"
    assert killed > 2, "the moments lie within the save"


def test_a_kill_while_a_new_folder_is_written_leaves_no_folder(tmp_path):
    status, number = save_killed_at(tmp_path / "1" / "new", 1), 1
    while os.WIFSIGNALED(status):
        folder = tmp_path / str(number) / "new"
        assert not folder.exists() or loaded_kind(folder) == "new"
        number += 1
        status = save_killed_at(tmp_path / str(number) / "new", number)
    assert number > 4 and loaded_kind(tmp_path / str(number) / "new") == "new"


def killed_between_weights_and_configuration(folder: Path) -> Path:
    """A folder below ``folder`` with new weights and an old configuration."""
    for number in range(1, 100):
        place = folder / str(number)
        model_of("old").save_pretrained(place)
        before = [(place / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
        save_killed_at(place, number)
        after = [(place / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
        if after[0] != before[0] and after[1] == before[1]:
            return place
    raise AssertionError("there is no such moment")


def test_the_configuration_of_a_killed_save_is_found_and_removed_when_it_is_of_no_use(tmp_path, monkeypatch):
    folder = killed_between_weights_and_configuration(tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    with pytest.warns(UserWarning, match="was killed before its configuration was in its place"):
        assert GoatConfig.from_pretrained(folder).r == 8
    assert loaded_kind(folder) == "new"
    monkeypatch.setattr(adapter_files, "_ABANDONED_S", -1)
    model_of("old").save_pretrained(folder)
    assert loaded_kind(folder) == "old"
    assert not list(folder.glob(".*"))


def test_weights_that_no_prepared_configuration_belongs_to_are_refused(tmp_path):
    folder = killed_between_weights_and_configuration(tmp_path)
    (left,) = {path.parent for path in folder.glob(f"{adapter_files.SAVING}*.tmp/adapter_config.json")}
    fields = json.loads((left / "adapter_config.json").read_text())
    (left / "adapter_config.json").write_text(json.dumps(fields | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        GoatConfig.from_pretrained(folder)


# --- a disk that takes no more, a folder that may not be written ---------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_disk_that_fills_up_leaves_the_old_adapter(size, tmp_path):
    model_of("old").save_pretrained(tmp_path / "adapter")
    before = contents(tmp_path)
    for name in ("adapter", "new"):
        with no_file_longer_than(size), pytest.raises((OSError, SafetensorError), match="too large"):
            model_of("new").save_pretrained(tmp_path / name)
        assert contents(tmp_path) == before and not list(tmp_path.rglob(".*"))
    assert loaded_kind(tmp_path / "adapter") == "old"


def test_a_read_only_folder_is_left_alone_and_its_adapter_loads(tmp_path):
    folder = tmp_path / "adapter"
    model_of("old").save_pretrained(folder)
    before = contents(folder)
    folder.chmod(0o555)
    try:
        with bound_by_permissions():
            with pytest.raises(PermissionError):
                (folder / "probe").touch()
            with pytest.raises(PermissionError):
                model_of("new").save_pretrained(folder)
            with pytest.raises(PermissionError):
                model_of("new").save_pretrained(folder / "new")
            assert contents(folder) == before
            assert loaded_kind(folder) == "old"
    finally:
        folder.chmod(0o755)
