"""Measure which tiles are fastest on this GPU, for the layers that you train, and write them to a file.

    goat-kernels tune --in-features 4096 --out-features 4096 --r 32 --output tiles.json
    GOAT_KERNELS_TILES=tiles.json python train.py

Every candidate is compiled first, on all processors, about a second each on one of them; --candidates tries fewer.
Nothing is measured unless this command is run: without a file the package's own table is used.

Exit code: 0 if the file was written.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from bench.command import DTYPES, whole
from bench.tuning import candidates, choices_of, tune, words_of
from goat_kernels.backends import why_not_auto
from goat_kernels.checks.problem import LayerCase
from goat_kernels.command_errors import CommandError
from goat_kernels.kernels.tiles import TILES_VARIABLE, write_entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option of ``goat-kernels tune``."""
    parser.add_argument("--output", required=True, metavar="FILE", help="where the tiles go; must not exist")
    parser.add_argument("--tokens", type=whole, nargs="+", default=[8192], metavar="T", help="tokens of a step (8192)")
    parser.add_argument("--in-features", type=whole, default=4096, metavar="N", help="of the layer (%(default)s)")
    parser.add_argument("--out-features", type=whole, default=4096, metavar="M", help="of the layer (%(default)s)")
    parser.add_argument("--r", type=whole, default=32, metavar="R", help="total rank (%(default)s)")
    parser.add_argument("--num-experts", type=whole, default=8, metavar="E", help="experts (%(default)s)")
    parser.add_argument("--top-k", type=whole, default=2, metavar="K", help="experts of a token (%(default)s)")
    parser.add_argument("--residual", choices=("path", "fold"), default="path", help="its form (%(default)s)")
    parser.add_argument("--dropout", action="store_true", help="tune the kernels with dropout")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of x (%(default)s); the adapter is float32"
    )
    parser.add_argument("--candidates", type=whole, metavar="COUNT", help="try so many tiles a kernel (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        CommandError: no GPU, a shape that GOAT does not have, or a file that is there already.
    """
    output = Path(arguments.output)
    if output.exists():
        raise CommandError(f"--output {arguments.output!r} exists; name a new file")
    if not output.absolute().parent.is_dir():
        raise CommandError(f"--output {arguments.output!r} needs a folder that exists")
    if arguments.r % arguments.num_experts:
        raise CommandError(f"--r {arguments.r} must be a multiple of --num-experts {arguments.num_experts}")
    if arguments.top_k > arguments.num_experts:
        raise CommandError(f"--top-k {arguments.top_k} must be at most --num-experts {arguments.num_experts}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = why_not_auto("triton", device, getattr(torch, arguments.dtype))
    if reason is not None:
        raise CommandError(f"there is nothing to tune here: {reason}")
    layer = LayerCase(
        arguments.tokens[0],
        arguments.in_features,
        arguments.out_features,
        R=arguments.r,
        E=arguments.num_experts,
        K=arguments.top_k,
        dtype=getattr(torch, arguments.dtype),
        path=arguments.residual == "path",
        dropout_p=0.05 if arguments.dropout else 0.0,
    )
    layers = [replace(layer, T=T) for T in arguments.tokens]
    total = sum(len(candidates(c, arguments.candidates)) for layer in layers for c in choices_of(layer, device))
    with tqdm(total=total, unit="tile") as bar:
        entries = tune(layers, device, lambda measurement: bar.update(), limit=arguments.candidates)
    for entry in entries:
        tiles = "; ".join(map(words_of, entry.tiles))
        print(f"{entry.kernel}, {entry.min_columns}-{entry.max_columns} columns: {tiles}")
    write_entries(entries, output)
    print(f"Written. Use it with {TILES_VARIABLE}={output}")
    return 0
