"""Kernels compiled for a GPU that is not there: registers, spills and shared memory of each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.core.errors import Missing
from .launch import Launch

SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability times ten
(CUDA C++ Programming Guide, table of technical specifications)."""

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What ptxas made of one kernel."""

    registers: int
    """32-bit registers a thread."""
    spilled: int
    """Bytes of local memory a thread: registers that did not fit."""
    shared: int
    """Bytes of shared memory a program."""


def compile_for(launch: Launch, capability: int) -> Figures:
    """Compile a launch for ``sm_<capability>`` (80, 90, 100) with triton's own ptxas.

    Raises ``Missing`` where ptxas or cuobjdump is not there.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, (name, argument) in enumerate(zip(names, launch.arguments, strict=False)):
        signature[name] = _type(argument)
        if signature[name] == "constexpr":
            constants[name] = argument
        elif _aligned(argument) and name not in launch.kernel.do_not_specialize:
            attributes[index,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    try:
        kernel = triton.compile(source, target=target, options=launch.options)
    except (FileNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Cannot find" not in str(error):
            raise
        raise Missing(f"{error}: triton's wheel carries ptxas; pip install triton") from None
    registers, spilled = _usage(kernel.asm["cubin"])
    return Figures(registers, spilled, kernel.metadata.shared)


def _type(argument: Any) -> str:
    """As triton's launcher specialises it: ``None`` and 1 are constants."""
    if isinstance(argument, torch.Tensor):
        return "*" + _TYPES[argument.dtype]
    return "constexpr" if argument is None or argument == 1 else "i32"


def _aligned(argument: Any) -> bool:
    return not isinstance(argument, int) or argument % 16 == 0


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as cuobjdump reads them off the binary."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise Missing(f"cuobjdump of triton does not run: {error}") from None
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if match is None:
        raise Missing(f"cuobjdump of triton says nothing of registers: {text.strip()[-200:]}")
    return int(match[1]), int(match[2]) + int(match[3])
