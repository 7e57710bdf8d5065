"""The C kernel: built on first use where the machine has a C compiler, and kept for the next process.

An install needs no compiler: without one, or with ``LOWRANK_FT_NO_COMPILER=1``, everything runs through
:mod:`lowrank_ft.basis.philox`, to the same bits. Nothing is downloaded, and what is loaded was built from the
source beside this file: its place in the user's cache is named by a hash of the source and the machine.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from lowrank_ft.basis.philox import Stream

SOURCE = Path(__file__).with_name("philox.c")
# Contraction into fused multiply-adds would round in other places than plain torch does.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c99", "-shared", "-fPIC")

_BITS = {torch.float32: 32, torch.float64: 64}


def available() -> bool:
    """Whether the kernel can run here; the first call builds it."""
    return _library() is not None


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.combine`."""
    coefficients = coefficients.detach().contiguous()
    bits, real = _BITS[coefficients.dtype], _real(coefficients)
    out = coefficients.new_empty(count)
    _function(f"combine_{bits}")(
        *_words(stream), _at(coefficients), ctypes.c_int64(len(coefficients)), real(scale), _at(out),
        ctypes.c_int64(count),
    )  # fmt: skip
    return out


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.project`."""
    gradient = gradient.detach().contiguous()
    out = gradient.new_empty(bases)
    sums = torch.empty(bases, dtype=torch.float64)
    _function(f"project_{_BITS[gradient.dtype]}")(
        *_words(stream), _at(gradient), ctypes.c_int64(len(gradient)), ctypes.c_double(scale), _at(out),
        _at(sums), ctypes.c_int64(bases),
    )  # fmt: skip
    return out


def _real(tensor: Tensor) -> type[ctypes.c_float] | type[ctypes.c_double]:
    return ctypes.c_float if tensor.dtype == torch.float32 else ctypes.c_double


def _words(stream: Stream) -> tuple[ctypes.Array[ctypes.c_uint32], ctypes.Array[ctypes.c_uint32]]:
    pair = ctypes.c_uint32 * 2
    return pair(*stream.key), pair(*stream.tail)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _function(name: str) -> ctypes._NamedFuncPointer:
    library = _library()
    assert library is not None
    function: ctypes._NamedFuncPointer = getattr(library, name)
    function.restype = None
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("LOWRANK_FT_NO_COMPILER") == "1":
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"The kernel {SOURCE.name} could not be built with {compiler}, so random bases are drawn by "
            f"plain torch, many times slower. Set LOWRANK_FT_NO_COMPILER=1 to be asked no more. {detail}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _built(compiler: str) -> Path:
    """Return the library, which another process may have built before."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_ft"
    name = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, compiler, _machine())).encode()).hexdigest()[:16]
    target = cache / f"philox-{name}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            built.replace(target)  # whole or not there, whoever else builds it now
    return target


def _machine() -> str:
    """What decides which instructions the processor has: home directories can be shared by many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
