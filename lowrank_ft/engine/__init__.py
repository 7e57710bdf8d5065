"""The only code that changes a model, and functions that inspect one.

A method decides which modules are replaced by which (``structure``), and their values. Everything is built
and filled before the first module is replaced, so an error leaves the model unchanged.

``state`` inspects models, ``surgery`` changes them, ``adapters`` has the operations on adapters, ``pipeline``
runs a method, and ``wrapping`` has :func:`wrap`. Each imports only from those before it.
"""

from lowrank_ft.engine.adapters import (
    cast_adapters,
    delete_adapter,
    disable,
    folded,
    keep_adapters_in_float32,
    merge,
    merge_drift,
    restore_state,
    set_adapter,
    unload,
    unmerge,
)
from lowrank_ft.engine.counting import bytes_of, count, numbers_in
from lowrank_ft.engine.digest import check_digest, digest_of_values, digests
from lowrank_ft.engine.state import (
    QUANT_METHOD,
    SCHEMA,
    active_adapters,
    adapter_names,
    carries,
    check_can_wrap,
    compressed,
    frozen_keys,
    hosts,
    recipes_of,
    replaced_state,
    require_adapter,
    stages_of,
    state_of,
    stock_tensors,
)
from lowrank_ft.engine.surgery import (
    build,
    commit,
    instead,
    meta_twin,
    multiplied_out,
    replace,
    restore_structure,
)
from lowrank_ft.engine.wrapping import calibration_of, requantize, trains, wrap

__all__ = [
    "QUANT_METHOD",
    "SCHEMA",
    "active_adapters",
    "adapter_names",
    "build",
    "bytes_of",
    "calibration_of",
    "carries",
    "cast_adapters",
    "check_can_wrap",
    "check_digest",
    "commit",
    "compressed",
    "count",
    "delete_adapter",
    "digest_of_values",
    "digests",
    "disable",
    "folded",
    "frozen_keys",
    "hosts",
    "instead",
    "keep_adapters_in_float32",
    "merge",
    "merge_drift",
    "meta_twin",
    "multiplied_out",
    "numbers_in",
    "recipes_of",
    "replace",
    "replaced_state",
    "requantize",
    "require_adapter",
    "restore_state",
    "restore_structure",
    "set_adapter",
    "stages_of",
    "state_of",
    "stock_tensors",
    "trains",
    "unload",
    "unmerge",
    "wrap",
]
