"""C kernels: built on first use if the machine has a C compiler, and cached for later processes.

A compiler is optional: without one, or with ``LOWRANK_FT_NO_COMPILER=1``, plain torch computes bit-identical
results. Nothing is downloaded. A library is built from a C file of this package and kept in the user's cache
directory; its file name contains a hash of the source and of the machine.
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
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

# Fused multiply-adds would round differently from plain torch.
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c99", "-shared", "-fPIC")


@dataclass(frozen=True)
class Kernel:
    """The functions of one C file.

    Attributes:
        source: the C file, in this package.
        without: what is slower without the kernel, for the warning.
    """

    source: Path
    without: str

    def available(self) -> bool:
        """Whether the kernel can run here; the first call builds it."""
        return library(self) is not None

    def function(self, name: str) -> ctypes._NamedFuncPointer:
        """Return a C function, which must return void; the kernel must be available."""
        loaded = library(self)
        assert loaded is not None
        function: ctypes._NamedFuncPointer = getattr(loaded, name)
        function.restype = None
        return function


@functools.cache
def library(kernel: Kernel) -> ctypes.CDLL | None:
    """Return a kernel's library, or None if there is no compiler or it fails."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("LOWRANK_FT_NO_COMPILER") == "1":
        return None
    try:
        return ctypes.CDLL(str(_built(kernel.source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"The kernel {kernel.source.name} could not be built with {compiler}, so {kernel.without}. Set "
            f"LOWRANK_FT_NO_COMPILER=1 to silence this warning. {detail}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def at(tensor: Tensor) -> ctypes.c_void_p:
    """Return the address of a tensor's first element."""
    return ctypes.c_void_p(tensor.data_ptr())


def _built(source: Path, compiler: str) -> Path:
    """Return the path of the library; build it unless another process has."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowrank_ft"
    name = hashlib.sha256(source.read_bytes() + repr((FLAGS, compiler, _machine())).encode()).hexdigest()[:16]
    target = cache / f"{source.stem}-{name}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            output = Path(scratch) / target.name
            command = [compiler, *FLAGS, "-o", str(output), str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            output.replace(target)  # atomic, since another process may build it at the same time
    return target


def _machine() -> str:
    """Identify the processor's instruction set: several kinds of machine can share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"
