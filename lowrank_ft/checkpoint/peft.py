"""PEFT's LoRA directories: write ours in PEFT's form, and load PEFT's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_ft import engine, solve
from lowrank_ft.algorithms.lora import LoRADelta, LoRANode, Scaling
from lowrank_ft.anatomy import layouts, sites
from lowrank_ft.checkpoint import card, files
from lowrank_ft.errors import CheckpointError, StateError
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.copied import CopyNode, TrainedCopy
from lowrank_ft.modules.layer import ConvLayer, Layer, layer_of
from lowrank_ft.structure.node import Node

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}

# Options of PEFT's LoRA that change what the tensors mean, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
}
# Initialisations that changed the base weight: their A and B are wrong on the original base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a PEFT adapter (and is not one of ours)."""
    return (directory / CONFIG).is_file()


# Export -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exported:
    """One layer's LoRA as PEFT writes it."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    transposed: bool
    tensors: Mapping[str, Tensor]
    energies: tuple[float, float]  # squared norms of the error of a smaller rank, and of the update


def export(model: nn.Module, directory: Path, tokenizer: Any, rank: int | None = None) -> dict[str, Any]:
    """Write the active adapter as a PEFT LoRA on the unmodified base.

    LoRA is written bit for bit. Other updates are written in their exact low-rank form (PiSSA, OLoRA and
    CorDA with twice the rank); updates without such a form are refused.

    Args:
        model: the model.
        directory: where to.
        tokenizer: saved alongside.
        rank: replace updates of a larger rank by the nearest of this one.

    Returns:
        with ``rank``, the ``"relative error"`` that leaves: ``‖ΔW − ΔW_r‖ / ‖ΔW‖`` over all layers.

    Raises:
        StateError: no adapter or several are active, or a layer that PEFT cannot express.
    """
    active = engine.active_adapters(model)
    if len(active) != 1:
        raise StateError(
            f"PEFT form holds one adapter, but {list(active) or 'none'} are active: set_adapter() one."
        )
    name = active[0]
    compressed = engine.compressed(model)
    if compressed:
        raise StateError(
            f"PEFT form is an adapter on the unmodified base, and {compressed[0]} is compressed "
            f"({len(compressed)} such modules): save() the model whole, or export(model, dir, 'dense')."
        )
    layers: dict[str, _Exported] = {}
    tensors: dict[str, Tensor] = {}
    saved: list[str] = []
    for path, host in engine.hosts(model).items():
        if name not in host.parts:
            continue
        if isinstance(host, TrainedCopy):
            saved.append(path)
            tensors.update({f"{PREFIX}{path}.{k}": v for k, v in host.parts[name].state_dict().items()})
        elif isinstance(host, Adapted):
            layers[path] = _export_layer(path, host, name, rank)
            tensors.update({f"{PREFIX}{path}.{k}": v for k, v in layers[path].tensors.items()})
    config = _config(model, layers, saved)
    facts: dict[str, Any] = {}
    if rank is not None:
        lost, whole = (sum(layer.energies[i] for layer in layers.values()) for i in (0, 1))
        facts["relative error"] = math.sqrt(lost / whole) if whole else 0.0
    with files.staged(directory) as staging:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
            staging / WEIGHTS,
            metadata={"format": "pt"},
        )
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        recipe = engine.state_of(model).recipes.get(name, {})
        (staging / card.CARD).write_text(_card(config, recipe, facts), encoding="utf-8")
        files.write_index(staging, {"content": "peft", "adapters": {name: recipe}}, [WEIGHTS, CONFIG])
    return facts


@torch.no_grad()
def _export_layer(path: str, host: Adapted, name: str, at_most: int | None) -> _Exported:
    delta, layer = host.deltas[name], host.layer
    _check_conv(path, layer)
    form = delta.as_lora()
    if form is None:
        raise StateError(
            f"The {host.nodes[name].kind!r} adapter on {path} has no exact LoRA form, so PEFT cannot hold it."
        )
    A, B = form.A, form.B
    rank, alpha, rslora = A.shape[0], form.scale * A.shape[0], False
    energies = (0.0, 0.0)
    if at_most is not None:
        A, B, energies = _nearest(A, B, at_most)
        rank, alpha = A.shape[0], form.scale * A.shape[0]
    elif isinstance(delta, LoRADelta) and not delta.node.anchored:
        alpha, rslora = delta.node.alpha, delta.node.scaling == "rslora"
    tensors = _layout_out(layer, A, B)
    magnitude = delta.magnitude if isinstance(delta, LoRADelta) and delta.node.dora else None
    if magnitude is not None:
        spatial = (1,) * layer.spatial if isinstance(layer, ConvLayer) else ()
        tensors["lora_magnitude_vector"] = magnitude.reshape(1, -1, *spatial) if spatial else magnitude
    return _Exported(
        rank, alpha, rslora, magnitude is not None, delta.dropout, layer.kind == "transposed-linear", tensors,
        energies,
    )  # fmt: skip


def _nearest(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The nearest product of a rank, and the squared norms of its error and of the update."""
    whole = solve.Factors(B.detach().double(), A.detach().double())
    cut = whole.balanced(min(rank, *A.shape, *B.shape))
    total, kept = ((f.B.T @ f.B * (f.A @ f.A.T)).sum() for f in (whole, cut))
    return cut.A.to(A.dtype), cut.B.to(B.dtype), (max(float(total - kept), 0.0), float(total))


def _check_conv(path: str, layer: Layer) -> None:
    """Refuse convolutions that PEFT's LoRA computes differently, or does not support."""
    if not isinstance(layer, ConvLayer):
        return
    conv = layer.module
    problems = {
        "a transposed kernel": layer.kind == "transposed-conv",
        f"groups={conv.groups}": conv.groups != 1,
        f"dilation={conv.dilation}": any(d != 1 for d in conv.dilation),
        f"padding_mode={conv.padding_mode!r}": conv.padding_mode != "zeros",
    }
    for problem, present in problems.items():
        if present:
            raise StateError(
                f"{path} is a convolution with {problem}, which PEFT's LoRA does not compute. Leave it out "
                f"of the targets, or export(format='dense')."
            )


def _layout_out(layer: Layer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    if layer.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    if isinstance(layer, ConvLayer):
        A = layer.to_weight(A)
        B = B.reshape(*B.shape, *(1,) * layer.spatial)
    return {"lora_A.weight": A, "lora_B.weight": B}


def _config(model: nn.Module, layers: Mapping[str, _Exported], saved: list[str]) -> dict[str, Any]:
    if not layers:
        raise StateError("The active adapter has no low-rank layer, so there is nothing for PEFT to hold.")
    first = next(iter(layers.values()))
    for flag in ("rslora", "dora", "transposed"):
        if len({getattr(layer, flag) for layer in layers.values()}) > 1:
            raise StateError(f"PEFT has one setting of {flag} for an adapter, but the layers differ in it.")
    _check_suffixes(model, saved)
    task = next((t for ending, t in _TASKS.items() if type(model).__name__.endswith(ending)), None)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not layouts.head_names(model) & set(saved):
        task = None  # PEFT would look for a trained head in the checkpoint
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rslora,
        "use_dora": first.dora,
        "fan_in_fan_out": first.transposed,
        "target_modules": _shortest_targets(model, list(layers)),
        "rank_pattern": {
            f"^{re.escape(p)}": layer.rank for p, layer in layers.items() if layer.rank != first.rank
        },
        "alpha_pattern": {
            f"^{re.escape(p)}": layer.alpha for p, layer in layers.items() if layer.alpha != first.alpha
        },
        "modules_to_save": saved or None,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _shortest_targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Name endings (``q_proj``) where they select just these layers, full names where they do not."""
    endings = sorted({path.rpartition(".")[2] for path in paths})
    everything = sites.stock_modules(model)
    hit = {name for name in everything for ending in endings if sites.matches(ending, name)}
    return endings if hit == set(paths) else sorted(paths)


def _check_suffixes(model: nn.Module, saved: list[str]) -> None:
    """PEFT matches saved modules by ending, so a full name can catch another module too."""
    for path in saved:
        caught = [name for name in sites.stock_modules(model) if name.endswith(f".{path}")]
        if caught:
            raise StateError(
                f"PEFT would take {caught[0]} for the trained module {path}; it cannot tell them apart."
            )


def _card(config: Mapping[str, Any], recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = config["base_model_name_or_path"] or ""
    header = ModelCardData(
        base_model=base if card.is_hub_name(base) else None, library_name="peft", tags=["lora"]
    )
    made = f"Trained with lowrank_ft ({recipe['method']}: {recipe['options']})." if recipe else ""
    made += "".join(f" Cut to rank {config['r']}: {what} {value:.4f}." for what, value in facts.items())
    return f"---\n{header.to_yaml()}\n---\n\n# LoRA adapter for {base or 'a local model'}\n\n{made}\n"


# Import -----------------------------------------------------------------------------------------------------


def load(model: nn.Module, directory: Path, name: str) -> None:
    """Put a PEFT LoRA adapter onto the model, as if it had been wrapped and trained here.

    Raises:
        CheckpointError: another kind of PEFT adapter, an option that has no meaning here, tensors that do
            not fit.
    """
    config = _read_config(directory)
    weights = _read_weights(directory)
    engine.check_can_wrap(model, name)
    modules = sites.stock_modules(model)
    by_layer, saved = _sort(weights, modules, config)

    nodes: dict[str, Node] = {path: _node(path, tensors, config) for path, tensors in by_layer.items()}
    nodes.update({path: CopyNode(trainable=True) for path in saved})
    values = {p: _layout_in(layer_of(modules[p], p), by_layer[p]) for p in by_layer} | saved
    _check_shapes(values, engine.build(model, nodes, on_meta=True))
    parts = engine.build(model, nodes)
    with torch.no_grad():
        for path, part in parts.items():
            for key, tensor in part.state_dict().items():
                tensor.copy_(values[path][key])
    options = {key: config[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora") if key in config}
    engine.commit(model, name, nodes, parts, {"method": "lora", "options": options, "from": "peft"})


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / CONFIG} is damaged: {error!r}.") from error
    if kind != "LORA":
        raise CheckpointError(f"{directory} holds a PEFT adapter of type {kind}; only LORA can be loaded.")
    for option, neutral in _NEUTRAL.items():
        if config.get(option, neutral[0]) not in neutral:
            raise CheckpointError(
                f"{directory} uses PEFT's option {option}={config[option]!r}, which is not supported."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{directory} was started with init_lora_weights={start!r}, which changed the base model, so it "
            f"means nothing on the original one. Convert it in PEFT first: save_pretrained(…, "
            f"path_initial_model_for_weight_conversion=…)."
        )
    return dict(config)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing. Adapters saved with pickle (.bin) are not read: convert them in PEFT."
        )
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


Tensors = dict[str, dict[str, Tensor]]


def _sort(
    weights: Mapping[str, Tensor], modules: Mapping[str, nn.Module], config: Mapping[str, Any]
) -> tuple[Tensors, Tensors]:
    """Sort PEFT's keys into layers' LoRA tensors and the state of modules trained in full."""
    pattern = re.compile(
        r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?"
    )
    layers: Tensors = {}
    saved: Tensors = {}
    wanted = config.get("modules_to_save") or []
    for key, tensor in weights.items():
        path = key.removeprefix(PREFIX)
        match = pattern.fullmatch(path)
        if match:
            layers.setdefault(match[1], {})[match[2]] = tensor
            continue
        if path.endswith(".base_layer.weight"):
            continue  # a frozen embedding that PEFT saved with the adapter
        owner = next(
            (n for n in modules if path.startswith(f"{n}.") and any(sites.matches(w, n) for w in wanted)),
            None,
        )
        if owner is None:
            raise CheckpointError(
                f"The PEFT adapter has a tensor {key!r} that belongs to no layer of this model."
            )
        saved.setdefault(owner, {})[path.removeprefix(f"{owner}.")] = tensor
    for path in layers:
        if path not in modules:
            raise CheckpointError(f"The PEFT adapter is for a layer {path!r} that this model does not have.")
    return layers, saved


def _node(path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoRANode:
    A = tensors.get("lora_A", tensors.get("lora_embedding_A"))
    if A is None:
        raise CheckpointError(f"The PEFT adapter has no A for {path}.")
    alpha = _pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    scaling: Scaling = "rslora" if config.get("use_rslora") else "standard"
    dora = "lora_magnitude_vector" in tensors
    return LoRANode(A.shape[0], float(alpha), scaling, float(config.get("lora_dropout", 0.0)), dora)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's own rule: the first key that, as a regular expression, matches an ending of the name."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _layout_in(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert PEFT's tensors to ours: matrices for every kind of layer."""
    rename = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}
    values = {}
    for key, tensor in tensors.items():
        values[rename.get(key, "magnitude")] = tensor.flatten() if key not in rename else tensor.flatten(1)
    return values


def _check_shapes(values: Tensors, shells: Mapping[str, nn.Module]) -> None:
    for path, part in shells.items():
        for key, tensor in part.state_dict().items():
            given = values[path].get(key)
            if given is None or given.shape != tensor.shape:
                shape = "nothing" if given is None else tuple(given.shape)
                raise CheckpointError(
                    f"The PEFT adapter has {shape} for {key} of {path}, which needs {tuple(tensor.shape)}."
                )
