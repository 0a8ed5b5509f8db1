"""Ahead-of-time compilation: what the kernels need of a chip, found without one.

Every specimen's launches are compiled for a target, with the default plans and with those that were tuned on a GPU of
that target. Types, alignments and constants are found by Triton's own functions, so that what is compiled is what a
launch would compile. (`create_function_from_signature` and `_pack_args` are private names; they are the same in
Triton 3.6 and 3.9.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from fastseg.kernels import launch
from fastseg.kernels.launch import Launch, Plan
from fastseg.kernels.specimen import Specimen, record
from fastseg.kernels.specimens import SPECIMENS

DEFAULT = "default"  # the origin of plans that no GPU's table holds

# Fewer compilations than this take less time than starting the processes that would share them.
LEAST_FOR_PROCESSES = 4

# Instructions of tensor cores, by what the compiled text calls them.
MATRIX_INSTRUCTIONS = {
    "mma": r"\bmma\.sync\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_s?mfma\w*",
    "wmma": r"\bv_s?wmma\w*",
}


class Job(NamedTuple):
    """One compilation, all of which another process can be sent."""

    module: str
    kernel: str
    bucket: str
    origin: str
    plan: Plan
    specimen: str
    target: GPUTarget
    options: dict[str, Any]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]

    @property
    def code(self) -> str:
        """What the compiled code depends on: jobs alike in it are one."""
        return repr((self.module, self.kernel, self.options, self.signature, self.constants, self.attributes))


@dataclasses.dataclass(frozen=True)
class Row:
    """What a kernel needs in a configuration; ``error`` says why there is nothing to tell."""

    kernel: str
    bucket: str
    origin: str  # of the plan: "default", or the GPU that it was tuned on
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]  # but those of the tile
    signature: dict[str, str]  # Triton's names of types; "/16" where a pointer or a number is known to be a multiple
    specimen: str
    registers: int = 0  # of a thread
    spilled_bytes: int = 0  # of a thread: what it stores in private memory, which Triton uses for nothing else
    shared_bytes: int = 0  # of a program
    matrix_instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def types(self) -> list[str]:
        """The types of the tensors, in the arguments' order."""
        return [kind[1:].split("/")[0] for kind in self.signature.values() if kind.startswith("*")]


# ---- what to compile ----


def parse_target(text: str) -> GPUTarget:
    """The target that "cuda:90" or "hip:gfx942" names."""
    backend, _, architecture = text.partition(":")
    if backend == "cuda" and architecture.isdecimal():
        return GPUTarget("cuda", int(architecture), 32)
    if backend == "hip" and re.fullmatch(r"gfx[0-9a-f]{3,4}", architecture):
        return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    raise ValueError(f"target must be like 'cuda:90' or 'hip:gfx942', but got {text!r}")


def target_name(target: GPUTarget) -> str:
    """A target as `parse_target` takes it."""
    return f"{target.backend}:{target.arch}"


def make_job(item: Launch, target: GPUTarget, specimen: str, origin: str = DEFAULT) -> Job:
    """The compilation that a launch would need on a target."""
    kernel, backend = item.kernel, make_backend(target)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("kernels can't be compiled where TRITON_INTERPRET is set: unset it and start again")
    arguments = {**item.arguments, **item.plan.options(target.backend)}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    return Job(
        kernel.fn.__module__, item.name, item.bucket, origin, item.plan, specimen, target,
        dict(options.__dict__), signature, constants, attributes,
    )  # fmt: skip


def _distinct(jobs: Iterable[Job]) -> list[Job]:
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.code, job)
    return list(first.values())


def default_jobs(target: GPUTarget, specimens: Iterable[Specimen] = SPECIMENS) -> list[Job]:
    """Every distinct compilation that specimens need with the default plans."""
    return _distinct(make_job(item, target, specimen.name) for specimen in specimens for item in record(specimen))


def tuned_jobs(target: GPUTarget, specimens: Iterable[Specimen] = SPECIMENS) -> list[Job]:
    """Every distinct compilation that specimens need with the plans tuned on GPUs of the target."""
    jobs = []
    for path in sorted(launch.TUNED.glob("*.json")):
        if json.loads(path.read_text())["target"] != target_name(target):
            continue
        plans = launch.read_plans(path.stem)
        with contextlib.ExitStack() as trials:
            for (kernel, bucket), plan in plans.items():
                trials.enter_context(launch.trial(kernel, bucket, plan))
            launches = [(item, specimen.name) for specimen in specimens for item in record(specimen)]
        jobs += [
            make_job(item, target, name, path.stem) for item, name in launches if (item.name, item.bucket) in plans
        ]
    return _distinct(jobs)


# ---- compiling ----


def compile_kernel(job: Job) -> CompiledKernel:
    """Compiles; the result lies in Triton's cache, too, where a launch would find it."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    return triton.compile(source, target=job.target, options=job.options)


def compile_job(job: Job) -> Row:
    """Compiles, and reads what the kernel needs."""
    row = _row(job)
    try:
        compiled = compile_kernel(job)
    except Exception as error:  # whatever stopped the compiler belongs into the table
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}".strip())
    text = compiled.asm["ptx" if job.target.backend == "cuda" else "amdgcn"]
    registers, spilled = (_resources_cuda if job.target.backend == "cuda" else _resources_hip)(compiled)
    counts = {name: len(re.findall(pattern, text)) for name, pattern in MATRIX_INSTRUCTIONS.items()}
    return dataclasses.replace(
        row,
        registers=registers, spilled_bytes=spilled, shared_bytes=compiled.metadata.shared,
        matrix_instructions={name: count for name, count in counts.items() if count},
    )  # fmt: skip


def compile_jobs(jobs: list[Job]) -> Iterator[Row]:
    """Compiles all, in several processes where there are many, and yields each row in the jobs' order."""
    if len(jobs) < LEAST_FOR_PROCESSES:
        yield from map(compile_job, jobs)
        return
    # Processes forked from a fresh one: this one may have threads, and a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=context) as pool:
        for job, future in [(job, pool.submit(compile_job, job)) for job in jobs]:
            yield _result(job, future)


def _result(job: Job, future: Future[Row]) -> Row:
    try:
        return future.result()
    except BrokenProcessPool:
        return dataclasses.replace(
            _row(job), error="not compiled: the compiler, on this kernel or another one, ended its process"
        )


def _row(job: Job) -> Row:
    names = list(job.signature)
    constants = {names[path[0]]: value for path, value in job.constants.items() if names[path[0]].isupper()}
    return Row(
        job.kernel, job.bucket, job.origin, dict(job.plan.tile), job.plan.num_warps, job.plan.num_stages,
        {name: value if isinstance(value, int) else str(value) for name, value in constants.items()
         if name not in job.plan.tile},
        {name: _kind(job, (at,), kind) for at, (name, kind) in enumerate(job.signature.items()) if name.islower()},
        job.specimen,
    )  # fmt: skip


def _kind(job: Job, path: tuple[int, ...], kind: Any) -> str:
    """A type of the signature; those of tuples in parentheses."""
    if isinstance(kind, tuple):
        return f"({', '.join(_kind(job, (*path, at), part) for at, part in enumerate(kind))})"
    if kind == "constexpr":
        return str(job.constants[path])
    return kind + ("/16" if ["tt.divisibility", 16] in job.attributes.get(path, []) else "")


def _resources_cuda(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers, and bytes on the stack, if anything is stored there: some kernels have a frame that they don't use."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump says nothing of registers, but {usage!r}")
        registers, stack = int(found[1]), int(found[2])
        if stack > 0 and not re.search(r"\bSTL\b", _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)):
            stack = 0
    return registers, stack


def _output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resources_hip(compiled: CompiledKernel) -> tuple[int, int]:
    """Vector registers (accumulators are part of them), and bytes of scratch memory."""
    text = compiled.asm["amdgcn"]
    found = [re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size")]
    if found[0] is None or found[1] is None:
        raise RuntimeError("the compiled text says nothing of registers")
    return int(found[0][1]), int(found[1][1])


# ---- the command ----

HEADER = ("kernel", "bucket", "plan", "call", "tensors", "registers", "spilled", "shared", "tensor cores", "")


def table(rows: list[Row]) -> str:
    """The rows as text in columns; ends in a mark where a default plan spills."""
    cells = [HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def describe_plan(plan: Plan) -> str:
    """A plan in a line: "BLOCK_C=4 BLOCK_P=1024 num_warps=4 num_stages=1"."""
    numbers = {**plan.tile, "num_warps": plan.num_warps, "num_stages": plan.num_stages}
    return " ".join(f"{name}={number}" for name, number in numbers.items())


def _cells(row: Row) -> tuple[str, ...]:
    plan = describe_plan(Plan(row.tile, row.num_warps, row.num_stages))
    if row.origin != DEFAULT:
        plan = f"{plan} ({row.origin})"
    cells = (row.kernel, row.bucket, plan, row.specimen, " ".join(row.types))
    if row.error is not None:
        return (*cells, "-", "-", "-", "-", "FAILED: " + row.error.splitlines()[0])
    matrix = " ".join(f"{count} {name}" for name, count in row.matrix_instructions.items())
    mark = "SPILLS" if row.spilled_bytes and row.origin == DEFAULT else ""
    return (*cells, str(row.registers), str(row.spilled_bytes), str(row.shared_bytes), matrix or "-", mark)


def main(target_text: str, json_path: Path | None, specimens: Iterable[Specimen] = SPECIMENS) -> int:
    """Compiles everything for a target and prints the table; the exit status is 1 where something doesn't compile."""
    try:
        target = parse_target(target_text)
        jobs = default_jobs(target, specimens) + tuned_jobs(target, specimens)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(jobs)} kernels for {target_name(target)}, Triton {triton.__version__}", flush=True)
    rows = list(compile_jobs(jobs))
    print(table(rows))
    if json_path is not None:
        content = {
            "target": target_name(target),
            "triton": triton.__version__,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in rows if row.error is not None]
    for row in failed:
        print(f"\n{row.kernel} ({row.bucket}; {row.specimen}): {row.error}", file=sys.stderr)
    return 1 if failed else 0
