"""Does every kernel compile without spilling for GPUs that are not here? What does it take of their registers?

The passes run on meta tensors under :func:`goat_kernels.kernels.launch.observed`, which records launches instead of
running them; each is then compiled as Triton would for its arguments. Needs a process in which Triton does not
interpret (``goat-kernels check --compile`` sees to it).
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from goat_kernels.checks.problem import LayerCase, make_problem, name_of, run_passes
from goat_kernels.kernels.configs import KNOWN_TARGETS, forced_target
from goat_kernels.kernels.launch import Launch, observed
from goat_kernels.kernels.passes import TritonPasses

#: What a matrix instruction looks like in PTX or in AMD's assembly, the best first.
_MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Case:
    """One launch of a layer on a target, by its place among the layer's launches; ``tf32`` for float32 products."""

    target: str
    layer: LayerCase
    index: int
    tf32: bool = False


def record(layer: LayerCase, target: str, tf32: bool = False) -> list[Launch]:
    """The launches of one forward and backward of ``layer`` on ``target``, in order; nothing runs."""
    launches: list[Launch] = []
    switch = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with forced_target(KNOWN_TARGETS[target]), observed(launches.append):
            run_passes(TritonPasses(), make_problem(layer, "meta"))
    finally:
        torch.backends.cuda.matmul.fp32_precision = switch
    return launches


def source_of(launch: Launch) -> ASTSource:
    """The kernel with the types and properties that Triton would specialise it on for this launch's arguments."""
    fn = launch.kernel
    unspecialised = set(fn.do_not_specialize or ())
    signature, constants, aligned = {}, dict(launch.constants), []
    for position, name in enumerate(fn.arg_names):
        value = launch.arguments.get(name)
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = "*" + name_of(value.dtype).replace("float", "fp").replace("bfp", "bf").replace("int", "i")
            aligned.append(position)
        elif value is None or (value == 1 and isinstance(value, int) and name not in unspecialised):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unspecialised:
                aligned.append(position)
        else:
            signature[name] = "fp32"
    return ASTSource(fn, signature, constants, {(position,): [["tt.divisibility", 16]] for position in aligned})


def compile_case(case: Case) -> dict:
    """Compile one launch; raises what the compiler raises.

    Returns:
        What the compiler says of the kernel:

        kernel: its name.
        registers, spilled_bytes: per thread (vector registers on AMD); local memory that registers did not hold.
        shared_bytes: per program.
        matrix_instruction: the best that was found, or "".
        loops: instructions of each loop in the machine code, in its order: what a warp issues for a step of it. A step
            of few bytes and many instructions cannot keep up with the memory.
        tile_*: the fields of its tile.
        fault: None, or what is wrong with it.
    """
    launch = record(case.layer, case.target, case.tf32)[case.index]
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    is_amd = case.target.startswith("gfx")
    target = GPUTarget("hip", case.target, 64) if is_amd else GPUTarget("cuda", int(case.target[3:]), 32)
    compiled = triton.compile(source_of(launch), target=target, options=options)
    text, shared = compiled.asm["amdgcn" if is_amd else "ptx"], compiled.metadata.shared
    registers, spilled, loops = _amd_resources(text) if is_amd else _nvidia_resources(compiled.asm["cubin"])
    instruction = next((name for name in _MATRIX_INSTRUCTIONS if name in text), "")
    multiplies = "PRECISION" in launch.constants and launch.constants.get("WITH_PREFILL", True)
    multiplies_well = bool(instruction) or not (multiplies and case.layer.dtype.itemsize == 2)
    return {
        "kernel": launch.name,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "matrix_instruction": instruction,
        "loops": loops,
        **{f"tile_{name}": value for name, value in asdict(launch.tile).items()},
        "fault": fault_of(spilled, shared, KNOWN_TARGETS[case.target].shared_bytes, multiplies_well),
    }


def fault_of(spilled_bytes: int, shared_bytes: int, most_shared_bytes: int, multiplies_well: bool) -> str | None:
    """None, or what is wrong with a kernel; ``multiplies_well``: half-precision matrices by matrix instructions."""
    if spilled_bytes:
        return f"spills {spilled_bytes} bytes"
    if shared_bytes > most_shared_bytes:
        return f"takes {shared_bytes} bytes of shared memory of {most_shared_bytes}"
    return None if multiplies_well else "multiplies half-precision matrices without matrix instructions"


def _nvidia_resources(cubin: bytes) -> tuple[int, int, tuple[int, ...]]:
    """(registers, bytes of the stack that spilled registers go to, instructions of the loops) from a cubin.

    The assembler often reserves 8 or 16 bytes of stack that no instruction touches; those are not spilled.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("--dump-resource-usage", path))
        machine_code = _cuobjdump("--dump-sass", path)
    registers, stack = int(found.group(1)), int(found.group(2))
    is_touched = stack and re.search(r"\b(LDL|STL)\b", machine_code)
    return registers, stack if is_touched else 0, _nvidia_loops(machine_code)


def _nvidia_loops(machine_code: str) -> tuple[int, ...]:
    """From ``/*0a10*/  @P0 BRA 0x8f0 ;``: the distance of each branch back."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", machine_code)
    places = {int(address, 16): place for place, (address, _) in enumerate(code)}
    targets = [re.search(r"\bBRA\b.* 0x([0-9a-f]+)", instruction) for _, instruction in code]
    back = [place - places[int(to.group(1), 16)] for place, to in enumerate(targets) if to]
    return tuple(length + 1 for length in back if length > 0)  # the last instruction of all branches to itself


def _cuobjdump(option: str, path: Path) -> str:
    command = [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"), option, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd_resources(assembly: str) -> tuple[int, int, tuple[int, ...]]:
    """(vector registers, bytes of private memory, instructions of the loops) from AMD's assembly.

    The bytes are those of spilled registers, 4 each, or those kept in scratch. A loop is a label ``.LBB0_2:`` with a
    branch ``s_cbranch_vccnz .LBB0_2`` behind it.
    """
    names = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    registers, spilled, private = (int(re.search(rf"\.{name}:?\s+(\d+)", assembly).group(1)) for name in names)
    labels: dict[str, int] = {}
    instructions, loops = 0, []
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = instructions
        elif re.match(r"\s+[a-z]+_\w+", line):
            instructions += 1
            branch = re.search(r"_branch\w* (\.LBB\w+)", line)
            if branch and branch.group(1) in labels:
                loops.append(instructions - labels[branch.group(1)])
    return registers, max(4 * spilled, private), tuple(loops)


def layers(*, everything: bool) -> Iterator[LayerCase]:
    """Layers whose launches cover every kernel and rank bucket; with ``everything`` also every tile and form."""
    square = functools.partial(LayerCase, N=4096, M=4096)
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    if not everything:
        yield square(8192, R=32)
        yield square(8192, R=128, path=False)
        yield square(16, R=32)
        yield square(2048, R=8, path=False, dtype=fp16, dropout_p=0.05)
        yield square(2048, R=512, E=64)
        yield square(2048, R=16, K=3, dropout_p=0.05)
        yield square(2048, R=32, dtype=fp32)
        return
    ranks = (8, 32, 64, 128, 512)
    for R, path, dtype, T in itertools.product(ranks, (True, False), (bf16, fp32), (16, 64, 640, 4096, 16384)):
        yield square(T, R=R, path=path, dtype=dtype)
    for R, path, dtype, K in itertools.product(ranks, (True, False), (bf16, fp32), (2, 3)):
        yield square(16384, R=R, path=path, dtype=dtype, K=K, dropout_p=0.05)
    for R, dtype in itertools.product((64, 512), (bf16, fp32)):
        yield square(16384, R=R, dtype=dtype, E=64)
    for R in ranks[:3]:
        yield square(8192, R=R, dtype=fp16)
        yield square(8192, R=R, adapter_dtype=bf16)
        yield LayerCase(8192, N=4100, M=4098, R=R, onto_base=True)
        yield LayerCase(16384, N=4112, M=4144, R=R)  # no multiples of a step
    yield square(8192, R=15, E=5, K=3)
    for dtype in (bf16, fp32):
        yield LayerCase(16384, N=1000, M=1003, R=64, dtype=dtype, dropout_p=0.05)
    yield square(16384, R=16)  # 128 tokens a program on sm_90: lora_B rides
    yield square(16384, R=60, E=6)
    yield square(16384, R=100, E=4, path=False)
    yield square(8192, R=1, E=1, K=1)


def cases(*, everything: bool) -> list[Case]:
    """The launches to compile on each known target: one for each tile and dtype of a kernel, or with ``everything``
    one for each distinct set of constants and argument types.
    """
    found: dict[tuple, Case] = {}
    for target, layer in itertools.product(KNOWN_TARGETS, layers(everything=everything)):
        for tf32 in (False, True) if everything and layer.dtype == torch.float32 else (False,):
            for index, launch in enumerate(record(layer, target, tf32)):
                source = source_of(launch)
                key = (target, launch.name, launch.tile, layer.dtype)
                if everything:
                    key += (str(source.signature), str(source.constants), str(source.attrs))
                found.setdefault(key, Case(target, layer, index, tf32))
    return list(found.values())


def compile_all(chosen: Iterable[Case]) -> Iterator[tuple[Case, dict | BaseException]]:
    """Compile cases of :func:`cases` on all processors; each as it is done with the compiler's account or its error."""
    crashed: list[Case] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_case, case): case for case in chosen}
        for done in as_completed(futures):
            result = done.exception() or done.result()
            if isinstance(result, BrokenProcessPool):  # this case crashed the compiler, or another one did
                crashed.append(futures[done])
            else:
                yield futures[done], result
    for case in crashed:  # each in a process of its own
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            error = (done := pool.submit(compile_case, case)).exception()
            crash = RuntimeError("the compiler crashed") if isinstance(error, BrokenProcessPool) else None
            yield case, crash or error or done.result()
