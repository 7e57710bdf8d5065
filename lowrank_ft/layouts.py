"""What model families call their parts: rows of data, not classes."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from lowrank_ft.errors import TargetError, did_you_mean

# The role of a layer, by the longest suffix of its name that is listed here.
ROLES: dict[str, str] = {
    # Llama, Mistral, Qwen, Gemma, Phi
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "qkv_proj": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate-up",
    "down_proj": "down",
    # OPT, CLIP, Whisper
    "out_proj": "o",
    "fc1": "up",
    "fc2": "down",
    # GPT-2
    "c_attn": "qkv",
    "attn.c_proj": "o",
    "c_fc": "up",
    "mlp.c_proj": "down",
    # BERT, ViT, DINOv2
    "query": "q",
    "key": "k",
    "value": "v",
    "attention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
    # ConvNeXt
    "dwconv": "depthwise",
    "pwconv1": "up",
    "pwconv2": "down",
}

# Top-level modules that turn features into the task's output. Keywords such as "all-linear" never match
# inside them. transformers' own `get_output_embeddings()` counts as well.
HEADS = frozenset(
    {
        "lm_head",
        "embed_out",
        "score",
        "classifier",
        "classification_head",
        "qa_outputs",
        "cls",
        "head",
        "heads",
        "fc",
        "predictions",
        "generator_lm_head",
        "vocab_projector",
        "lm_prediction_head",
    }
)


@dataclass(frozen=True)
class Layout:
    """What a model family calls the coupled parts of a block, by the endings of their names.

    Attributes:
        up: the layer into the MLP.
        down: the layer out of it.
        gate: the layer whose activation multiplies ``up``'s output, if there is one.
        attention: the module that attends; empty where its heads cannot be resized here.
        q, k, v, o: its projections.
        rotary: whether positions turn pairs of dimensions of queries and keys.
        width: the option of the family's config that holds the width of all MLPs; empty where none does.
    """

    up: str
    down: str
    gate: str = ""
    attention: str = ""
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    rotary: bool = True
    width: str = "intermediate_size"


_LLAMA = Layout("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", attention="self_attn")
_BERT = Layout("intermediate.dense", "output.dense")

# One row for each `model_type` whose MLP and attention can be taken apart. Heads cannot be resized where
# queries, keys and values come from one matrix, or where attention is an encoder's, with another forward.
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": Layout("mlp.gate_up_proj", "mlp.down_proj"),  # gate and up in one matrix, and so q, k and v
    "opt": Layout("fc1", "fc2", attention="self_attn", o="out_proj", rotary=False, width="ffn_dim"),
    "gpt2": Layout("mlp.c_fc", "mlp.c_proj", width="n_inner"),  # q, k and v in one matrix
    "bert": _BERT,
    "roberta": _BERT,
    "vit": Layout("mlp.fc1", "mlp.fc2"),
    "convnext": Layout("pwconv1", "pwconv2", width=""),
    "dinov2": Layout("mlp.fc1", "mlp.fc2", width=""),
}


def layout_of(model: nn.Module) -> Layout:
    """Return the row of a model's family.

    Raises:
        TargetError: there is none.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in LAYOUTS:
        return LAYOUTS[kind]
    raise TargetError(
        f"There is no layout for the model type {kind!r} ({type(model).__name__}), so its coupled layers are "
        f"not known.{did_you_mean(str(kind), LAYOUTS)} Known: {', '.join(LAYOUTS)}. For a model whose MLP is "
        f"down(act(gate(x)) * up(x)), say what the layers are called: lowrank_ft.layouts.LAYOUTS[{kind!r}] = "
        f"Layout(up='mlp.up_proj', down='mlp.down_proj', gate='mlp.gate_proj')."
    )


def mlp_of(layout: Layout, name: str, names: Container[str]) -> tuple[str, ...]:
    """Return the layers of the MLP that a layer is in: gate (if there is one), up, down; empty if in none.

    Args:
        layout: the family's.
        name: the layer.
        names: of all modules, since several layers can have the ending that an MLP's has.
    """
    parts = [part for part in (layout.gate, layout.up, layout.down) if part]
    for part in parts:
        found = tuple(f"{name.removesuffix(part)}{other}" for other in parts)
        if name.endswith(f".{part}") and all(other in names for other in found):
            return found
    return ()


def role_of(name: str, module: nn.Module) -> str:
    """Return the role of a layer: ``"q"``, ``"down"``, ``"conv"``, ``"embedding"``… or ``"other"``."""
    parts = name.split(".")
    for start in range(len(parts)):  # the longest suffix first
        role = ROLES.get(".".join(parts[start:]))
        if role is not None:
            return role
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "other"


def head_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules that form the model's head."""
    names = {name for name, _ in model.named_children() if name in HEADS}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if isinstance(output, nn.Module):
        names.update(name for name, module in model.named_modules() if module is output)
    return frozenset(names)


def block_index(name: str) -> int | None:
    """Return the index of the block a module lies in: the first number in its name, as in PEFT."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
