"""Tiles: the table, the predicate, the choice for known and unknown GPUs, files of entries, and the tuner."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench.tuning import candidates, choices_of, most_sums, sums_per_thread, tune
from goat_kernels.checks.problem import LayerCase
from goat_kernels.cli import main
from goat_kernels.kernels import configs
from goat_kernels.kernels.configs import KNOWN_TARGETS, Choice, Target, choose_tile, find_tile, invalid_reason
from goat_kernels.kernels.tiles import TABLE, TILES_VARIABLE, Entry, Tile, read_entries, write_entries

#: A GPU that nobody has thought of, with the least shared memory that Triton's targets have.
UNKNOWN = Target("other", 20, 65536)
TARGETS = {**KNOWN_TARGETS, "unknown": UNKNOWN, "sm_86": Target("sm80", 84, 101376)}

#: The others serve some ranks, and stages take over above.
NEEDED = sorted({entry.kernel for entry in TABLE if entry.max_columns >= 1024})


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kernel", NEEDED)
def test_every_rank_up_to_512_with_its_pair_has_a_tile_that_is_valid(kernel, target):
    for itemsize in (2,) if "unaligned" in kernel else (2, 4):
        for columns in (16, 32, 48, 64, 128, 256, 512, 1024):
            for T in (1, 16, 64, 4096):
                # With dropout the adapter is packed in x's dtype for any number of tokens.
                for read_itemsize in (itemsize,) if "drop" in kernel else (itemsize, 4, 8):
                    tile = choose_tile(kernel, columns, itemsize, target, T, read_itemsize)
                    assert invalid_reason(kernel, tile, columns, itemsize, target, read_itemsize) is None


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_fused_kernels_take_the_tallest_tile_that_fills_the_gpu(target):
    many, few = (find_tile("fused_forward", 64, 2, target, T) for T in (10**6, 100))
    assert many.rows == (128 if target.family == "sm90" else 64)
    assert few.rows == 16
    assert -(-(10**6) // many.rows) >= 0.75 * target.multiprocessors


def test_more_columns_than_a_program_holds_is_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"lora_A.*4096 columns.*route_and_prefill.*2048"):
        choose_tile("route_and_prefill.alone", 4096, 2, KNOWN_TARGETS["sm_90"], 8192)
    assert find_tile("fused_forward", 4096, 2, KNOWN_TARGETS["sm_90"], 8192) is None


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.kernel}-{e.itemsize}-{e.max_columns}-{e.family}")
def test_every_entry_serves_some_known_gpu(entry):
    columns = min(entry.max_columns, 1024)
    targets = [t for t in KNOWN_TARGETS.values() if entry.family in ("any", t.family)]
    valid = [
        t for t in entry.tiles for g in targets if invalid_reason(entry.kernel, t, columns, entry.itemsize, g) is None
    ]
    assert valid


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 48}, ["rows=48", "power of two"]),
        ({"features": 8}, ["features=8", "16"]),
        ({"rank": 24}, ["rank=24", "power of two"]),
        ({"warps": 3}, ["warps=3"]),
        ({"stages": 0}, ["stages=0"]),
        ({"features": 1024, "stages": 8}, ["shared memory", "232448"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_predicate_says_what_is_wrong(change, words):
    good = Tile(64, 64, 4, 3)
    assert invalid_reason("fused_forward", good, 64, 2, KNOWN_TARGETS["sm_90"]) is None
    reason = invalid_reason("fused_forward", dataclasses.replace(good, **change), 64, 2, KNOWN_TARGETS["sm_90"])
    assert all(word in reason for word in words)


def test_a_kernel_that_runs_in_rank_blocks_needs_a_rank():
    reason = invalid_reason("project", Tile(64, 64, 4, 3), 64, 2, KNOWN_TARGETS["sm_90"])
    assert "rank=0" in reason and "project" in reason


@pytest.fixture
def tiles_file(tmp_path, monkeypatch):
    """A function that puts entries into a file which GOAT_KERNELS_TILES names."""
    path = tmp_path / "tiles.json"

    def use(text_or_entries):
        if isinstance(text_or_entries, str):
            path.write_text(text_or_entries)
        else:
            write_entries(text_or_entries, path)
        monkeypatch.setenv(TILES_VARIABLE, str(path))
        configs._entries_of_file.cache_clear()
        configs._tile_of_table.cache_clear()
        return path

    yield use
    monkeypatch.delenv(TILES_VARIABLE, raising=False)
    configs._entries_of_file.cache_clear()
    configs._tile_of_table.cache_clear()


def test_a_file_comes_before_the_table_for_the_columns_and_the_family_that_it_names(tiles_file):
    tuned = Tile(32, 32, 8, 2)
    tiles_file([Entry("fused_forward", 2, 64, (tuned,), "sm90", min_columns=33)])
    assert find_tile("fused_forward", 64, 2, KNOWN_TARGETS["sm_90"], 8192) == tuned
    assert find_tile("fused_forward", 32, 2, KNOWN_TARGETS["sm_90"], 8192) != tuned
    assert find_tile("fused_forward", 64, 2, KNOWN_TARGETS["sm_80"], 8192) != tuned


def test_entries_survive_a_file(tiles_file):
    entries = list(TABLE)
    assert read_entries(tiles_file(entries)) == TABLE
    assert not list(tiles_file(entries).parent.glob("*.partial"))


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[{"kernel": "fused_forward"}]', '[{"kernel": "x", "itemsize": 2, "max_columns": 9, "tiles": []}]'],
    ids=["no JSON", "no entry", "half an entry", "no such kernel"],
)
def test_a_bad_file_is_an_error_that_names_it(tiles_file, text):
    path = tiles_file(text)
    with pytest.raises(ValueError, match=TILES_VARIABLE) as error:
        read_entries(path)
    assert str(path) in str(error.value)


LAYER = LayerCase(100, 64, 64, R=8, path=False, dtype=torch.float32)


@pytest.mark.long
def test_the_tuner_takes_the_fastest_candidate_of_each_kernel_and_writes_the_tables_form(device, tmp_path):
    measured = []

    def time_ms(launch):  # 32 columns are the fastest, then the fewest warps
        return abs(launch.tile.features - 32) + launch.tile.warps

    entries = tune([LAYER], device, measured.append, time_ms, limit=3)
    launched = {choice.kernel for choice in choices_of(LAYER, device)}
    assert {entry.kernel for entry in entries} <= launched
    assert {"weight_gradient", "expand_columns"} <= {entry.kernel for entry in entries}
    for entry in entries:
        times = [m.time_ms for m in measured if m.choice.kernel == entry.kernel]
        (tile,) = entry.tiles
        best = min(times)
        assert best < float("inf")
        assert any(m.tile == tile and m.time_ms == best for m in measured if m.choice.kernel == entry.kernel)
    write_entries(entries, tmp_path / "tiles.json")
    assert list(read_entries(tmp_path / "tiles.json")) == entries


def test_candidates_are_valid_and_evenly_spread():
    choice = Choice("weight_gradient", 64, 2, KNOWN_TARGETS["sm_90"], 8192, 2)
    every, some = candidates(choice), candidates(choice, 10)
    assert len(some) <= 10 < len(every)
    assert {tile.rows for tile in some} == {tile.rows for tile in every}
    assert all(invalid_reason("weight_gradient", t, 64, 2, choice.target) is None for t in every)


def test_candidates_sum_in_registers_as_every_tile_of_the_table_does():
    for entry in TABLE:
        columns = min(entry.max_columns, 1024)
        for tile in entry.tiles:
            assert sums_per_thread(entry.kernel, tile, columns) <= most_sums(entry.kernel, entry.itemsize), (
                entry,
                tile,
            )
    choice = Choice("expand_columns", 64, 2, KNOWN_TARGETS["sm_90"], 8192, 2)
    shapes = {(tile.rows, tile.features, tile.warps) for tile in candidates(choice)}
    assert (128, 128, 4) in shapes and (128, 256, 8) in shapes
    assert (128, 256, 4) not in shapes, "256 sums a thread"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--r", "12"], ["--r 12", "--num-experts 8"]),
        (["--top-k", "9"], ["--top-k 9", "--num-experts 8"]),
        (["--tokens", "0"], ["--tokens", "at least 1"]),
        (["--output", "."], ["--output", "exists"]),
        (["--output", "nowhere/tiles.json"], ["--output", "folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_tune_refuses_in_one_line(options, words, capsys, tmp_path):
    output = [] if "--output" in options else ["--output", str(tmp_path / "tiles.json")]
    assert main(["tune", *output, *options]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)
    assert json.dumps(message).count("\\n") <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to tune here")
def test_tune_without_a_gpu_says_so(capsys, tmp_path):
    assert main(["tune", "--output", str(tmp_path / "tiles.json")]) == 2
    assert "nothing to tune here" in capsys.readouterr().err
