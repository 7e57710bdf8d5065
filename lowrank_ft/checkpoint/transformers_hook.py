"""``from_pretrained`` for models with our modules in them, through transformers' public quantiser registry.

The engine keeps the manifest in ``config.quantization_config``, so that the user's own ``save_pretrained``
(and Trainer's) writes it. After ``import lowrank_ft``, transformers finds this quantiser for it, which
builds the structure on the empty model and compares it with the files before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_ft import engine
from lowrank_ft.errors import CheckpointError, ConfigError
from lowrank_ft.structure import manifest


@register_quantization_config(engine.QUANT_METHOD)
class ManifestConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The engine's entry in ``config.quantization_config``, in the class that transformers expects."""

    def __init__(self, **content: Any) -> None:
        self.quant_method = content.pop("quant_method", engine.QUANT_METHOD)
        schema = content.get("schema")
        if not isinstance(schema, int) or not 1 <= schema <= engine.SCHEMA:
            raise ConfigError(
                f"The manifest in config.json has schema {schema!r}; this version reads {engine.SCHEMA}."
            )
        self.__dict__.update(content)


@register_quantizer(engine.QUANT_METHOD)
class ManifestQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the manifest's modules before the weights are loaded. It quantises nothing."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether Trainer may train the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether Trainer may train the model without a PEFT adapter on it."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        nodes = manifest.from_json(self.quantization_config.manifest)
        engine.restore_structure(model, nodes)
        if checkpoint_files:
            _check_files(model, checkpoint_files)
        engine.keep_adapters_in_float32(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        content = self.quantization_config
        self.remove_quantization_config(
            model
        )  # the engine writes it again, so that wrapped and loaded models are alike
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        stages = getattr(content, "stages", [])
        engine.restore_state(
            model, tuple(content.active), dict(content.recipes), stages, getattr(content, "digests", {})
        )
        return model


def _check_files(model: Any, checkpoint_files: Sequence[str]) -> None:
    """Raise ``CheckpointError`` unless the files hold every tensor that the structure needs, in its shape.

    transformers only warns about missing keys and then draws them at random.
    """
    held: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(
                f"{file} is not a safetensors file; models with a manifest are read from no other."
            )
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                held[key] = tuple(tensors.get_slice(key).get_shape())
    wanted = _as_in_files(model, engine.replaced_state(model))
    missing = sorted(set(wanted) - set(held))
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} tensors that its manifest calls for, {missing[0]!r} first. "
            f"If it was written during training with adapters alone, load() its adapter onto the base model."
        )
    for key, shape in wanted.items():
        if held[key] != shape:
            raise CheckpointError(
                f"{key} has the shape {held[key]} in the files, but {shape} in the manifest."
            )


def _as_in_files(model: Any, state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Rename tensors as ``save_pretrained`` does: for some models its names are not the model's.

    Tied tensors are in the files under one name only.
    """
    once = {k: t for k, t in state.items() if k not in model.all_tied_weights_keys}
    reverted = revert_weight_conversion(model, once)
    return {key: tuple(tensor.shape) for key, tensor in reverted.items()}
