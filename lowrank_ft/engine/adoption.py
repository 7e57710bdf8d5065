"""Take over a model that was loaded with bitsandbytes: put its codes and scales into this package's modules.

bitsandbytes' own layers are not safe on a CPU (see :mod:`lowrank_ft.quant.bnb`), and transformers saves,
moves and trains a model with such layers differently. Weights are not quantised again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.anatomy import sites
from lowrank_ft.engine.surgery import replace, write_config
from lowrank_ft.errors import StateError
from lowrank_ft.modules.layer import stock_linear
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.quant import Scheme, storage_of
from lowrank_ft.quant.bnb import NESTED_BLOCK
from lowrank_ft.structure.manifest import replacements

_MARKS = (  # attributes that transformers sets on a model that it loads with bitsandbytes
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
    "is_quantized",
    "quantization_method",
)
_CODEBOOKS: dict[str, Any] = {"nf4": "nf", "fp4": "fp4"}

# Attributes that were removed: the dict that had them, their names and values.
Removed = list[tuple[dict[str, Any], str, Any]]


@contextmanager
def adopted(model: nn.Module) -> Iterator[None]:
    """Replace bitsandbytes' linear layers by :class:`Quantized` ones; if the block raises, put them back.

    Codes and scales are shared with the replaced layers, so they need no further memory. Unlike in
    ``Linear8bitLt``, inputs are not quantised. A model without such layers is not changed.

    Args:
        model: any module. Its transformers config gets this package's manifest.

    Raises:
        StateError: a layer that is not quantised yet, not loaded, or repacked by bitsandbytes since (its
            forward in eval mode does so on some processors).
    """
    originals = {name: module for name, module in sites.stock_modules(model).items() if _is_quantised(module)}
    if not originals:
        yield
        return
    new = {name: _taken_over(module, name, _dtype(model, module)) for name, module in originals.items()}
    replace(model, new)
    marks = _remove_marks(model)
    write_config(model)
    try:
        yield
    except BaseException:
        if _are_only_replacements(model, new):
            replace(model, originals)
            for attributes, name, value in marks:
                attributes[name] = value
        raise


def _is_quantised(module: nn.Module) -> bool:
    # If bitsandbytes was never imported, no layer can be one of its own.
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def _are_only_replacements(model: nn.Module, new: Mapping[str, nn.Module]) -> bool:
    """Whether these modules are the only replacements in the model.

    If one of several stages fails, an earlier one may have succeeded. Its result is kept, and so are the
    taken over layers that it builds on.
    """
    replaced = replacements(model)
    return replaced.keys() == new.keys() and all(replaced[name] is module for name, module in new.items())


def _remove_marks(model: nn.Module) -> Removed:
    """Remove the attributes that transformers set on the model and its configs; return them."""
    places: list[tuple[dict[str, Any], str]] = []
    for module in model.modules():
        places += [(module.__dict__, name) for name in _MARKS]
        config = getattr(getattr(module, "config", None), "__dict__", {})
        places += [(config, "quantization_config"), (config, "_is_quantized")]
    removed: Removed = [
        (attributes, name, attributes.pop(name)) for attributes, name in places if name in attributes
    ]
    conversions = model.__dict__.get("_weight_conversions")
    if conversions:  # save_pretrained would apply them in reverse, to write bitsandbytes' format
        removed.append((model.__dict__, "_weight_conversions", conversions))
        model.__dict__["_weight_conversions"] = [c for c in conversions if not _is_of_quantizer(c)]
    return removed


def _is_of_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _dtype(model: nn.Module, layer: nn.Module) -> torch.dtype:
    """The dtype that the model computes in; the weight may have been quantised from another."""
    if isinstance(layer.bias, Tensor):
        return layer.bias.dtype
    for module in model.modules():
        for parameter in () if _is_quantised(module) else module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    state = getattr(layer.weight, "quant_state", None)
    return torch.float32 if state is None else state.dtype


# One layer --------------------------------------------------------------------------------------------------


def _taken_over(module: Any, name: str, dtype: torch.dtype) -> Quantized:
    """Return a layer of this package with the packed tensors of a bitsandbytes layer."""
    if module.weight.is_meta:
        _refuse(name, "its weight is on the meta device", "Load the model's weights first.")
    if isinstance(module, sys.modules["bitsandbytes"].nn.Linear4bit):
        scheme, packed = _four_bit(module, name)
    else:
        scheme, packed = _eight_bit(module, name)
    _check_sizes(module, name, scheme, packed)
    layer = Quantized(scheme, _shell(module, dtype))
    for key, tensor in {**packed, "weight": packed["codes"].new_empty(0, dtype=dtype)}.items():
        setattr(layer, key, tensor)
    if layer.bias is not None:
        layer.bias.requires_grad_(module.bias.requires_grad)
    return layer.train(module.training)


def _shell(module: Any, dtype: torch.dtype) -> nn.Module:
    """Return the stock layer that was quantised, with its weight on ``meta``."""
    # transformers sets this to the class of the layer that it replaced.
    source = getattr(module, "source_cls", nn.Linear)
    kind = "linear" if issubclass(source, nn.Linear) else "transposed-linear"
    matrix = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
    return stock_linear(kind, matrix, module.bias)


def _four_bit(module: Any, name: str) -> tuple[Scheme, dict[str, Tensor]]:
    state = getattr(module.weight, "quant_state", None)
    state = module.quant_state if state is None else state
    if state is None:
        _refuse(name, "it is not quantised yet", "Move the model to a device first.")
    if "packing_format_for_cpu" in vars(state):
        _refuse(name, "a forward in eval mode has repacked its weight", _RELOAD)
    if tuple(state.shape) != (module.out_features, module.in_features):
        shape = f"{module.out_features} × {module.in_features}"
        _refuse(name, f"it is {shape}, but its weight was quantised as {tuple(state.shape)}", _QUANTISE)
    scale_bits = 8 if state.nested else 32
    block = state.blocksize
    scheme = Scheme(_CODEBOOKS[state.quant_type], 4, block, scale_bits, library="bitsandbytes")
    packed = {"codes": _codes(module, name, block), "scales": state.absmax}
    if state.nested:
        _check_nested(name, state.state2)
        packed |= {"supers": state.state2.absmax, "offset": state.offset.reshape(1)}
    return scheme, packed


def _codes(module: Any, name: str, block: int) -> Tensor:
    """Return the codes, two in a byte, padded to a whole number of blocks."""
    weights = module.out_features * module.in_features
    codes: Tensor = module.weight.detach().contiguous().view(torch.uint8).flatten()
    if codes.numel() != -(-weights // 2):
        _refuse(name, f"its {weights} weights take {codes.numel()} bytes", _RELOAD)
    missing = -(-weights // block) * block // 2 - codes.numel()
    return F.pad(codes, (0, missing)) if missing else codes


def _check_nested(name: str, state: Any) -> None:
    from bitsandbytes.functional import create_dynamic_map

    code = create_dynamic_map().to(state.code.device)
    is_supported = state.blocksize == NESTED_BLOCK and state.dtype == torch.float32
    # The last bits of the map depend on torch's version.
    if not is_supported or not torch.allclose(state.code, code, rtol=1e-6, atol=0):
        _refuse(name, "its scales are not quantised by bitsandbytes' own dynamic map", _QUANTISE)


def _eight_bit(module: Any, name: str) -> tuple[Scheme, dict[str, Tensor]]:
    if module.state.has_fp16_weights:
        _refuse(name, "it keeps its weight in 16 bits", "Load the model without quantisation.")
    scales = module.weight.SCB  # the first forward moves it into the layer's state
    scales = module.state.SCB if scales is None else scales
    if scales is None:
        _refuse(name, "it is not quantised yet", "Move the model to a device first.")
    scheme = Scheme("int8", 8, library="bitsandbytes")
    return scheme, {"codes": module.weight.detach(), "scales": scales}


def _check_sizes(module: Any, name: str, scheme: Scheme, packed: Mapping[str, Tensor]) -> None:
    for key, shape in storage_of(scheme).shapes(module.out_features, module.in_features).items():
        tensor = packed[key]
        if tuple(tensor.shape) != shape.size or tensor.dtype != shape.dtype:
            _refuse(name, f"its {key} are {tuple(tensor.shape)} of {tensor.dtype}, not {shape.size}", _RELOAD)


_RELOAD = "Load the model again, and wrap() it before it runs."
_QUANTISE = "Quantise the original weights again."


def _refuse(name: str, why: str, remedy: str) -> NoReturn:
    raise StateError(f"bitsandbytes' layer {name} cannot be taken over: {why}. {remedy}")
