"""The names of layers and blocks in each model family, as tables."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from lowrank_ft.errors import TargetError, did_you_mean
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.structure import heads

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
class Attention:
    """The name endings of a model family's attention module and its projections.

    Attributes:
        name: the attention module.
        q, k, v: its projections; empty if ``qkv`` replaces all three.
        o: the output projection; it may lie outside of the attention module.
        qkv: one projection for queries, keys and values, in this order.
        rotary: whether queries and keys have a rotary position embedding.
    """

    name: str
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    rotary: bool = False


@dataclass(frozen=True)
class Layout:
    """The name endings of the coupled layers of a block in a model family.

    Attributes:
        up: the first layer of the MLP.
        down: the last layer of the MLP.
        gate: the layer whose activation multiplies the output of ``up``; empty if there is none.
        attention: the attention module with its projections; None if there is none.
        width: the field of the family's config that holds the width of all MLPs; empty if there is none.
    """

    up: str
    down: str
    gate: str = ""
    attention: Attention | None = None
    width: str = "intermediate_size"


def _projections(name: str, o: str = "o_proj", rotary: bool = False) -> Attention:
    q, k, v = (f"{name}.{part}_proj" for part in "qkv")
    return Attention(name, q, k, v, f"{name}.{o}", rotary=rotary)


def _fused(name: str, qkv: str, o: str, rotary: bool = False) -> Attention:
    return Attention(name, o=f"{name}.{o}", qkv=f"{name}.{qkv}", rotary=rotary)


_SELF = "attention.self"
_LLAMA = Layout("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", _projections("self_attn", rotary=True))
_BERT = Layout(
    "intermediate.dense",
    "output.dense",
    attention=Attention(_SELF, f"{_SELF}.query", f"{_SELF}.key", f"{_SELF}.value", "attention.output.dense"),
)

# One row for each `model_type` whose MLP and attention can be resized.
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": Layout(  # gate and up in one matrix
        "mlp.gate_up_proj", "mlp.down_proj", attention=_fused("self_attn", "qkv_proj", "o_proj", rotary=True)
    ),
    "opt": Layout("fc1", "fc2", attention=_projections("self_attn", "out_proj"), width="ffn_dim"),
    "gpt2": Layout("mlp.c_fc", "mlp.c_proj", attention=_fused("attn", "c_attn", "c_proj"), width="n_inner"),
    "bert": _BERT,
    "roberta": _BERT,
    "vit": Layout("mlp.fc1", "mlp.fc2", attention=_projections("attention")),
    "convnext": Layout("pwconv1", "pwconv2", width=""),
    "dinov2": Layout("mlp.fc1", "mlp.fc2", attention=_projections("attention"), width=""),
}


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of a model's family.

    Raises:
        TargetError: the family has no layout.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in LAYOUTS:
        return LAYOUTS[kind]
    raise TargetError(
        f"There is no layout for the model type {kind!r} ({type(model).__name__}), so its coupled layers are "
        f"not known.{did_you_mean(str(kind), LAYOUTS)} Known: {', '.join(LAYOUTS)}. For a model whose MLP is "
        f"down(act(gate(x)) * up(x)), say what the layers are called: "
        f"lowrank_ft.anatomy.layouts.LAYOUTS[{kind!r}] = Layout(up='mlp.up_proj', "
        f"down='mlp.down_proj', gate='mlp.gate_proj'); attention= adds its heads."
    )


def mlp_of(layout: Layout, name: str, names: Container[str]) -> tuple[str, ...]:
    """Return the names of the MLP that contains a layer: gate (if any), up, down; empty if in no MLP.

    Args:
        layout: the family's layout.
        name: the layer's name.
        names: the names of all modules, since a layer outside of MLPs can have the same ending.
    """
    parts = [part for part in (layout.gate, layout.up, layout.down) if part]
    for part in parts:
        layers = tuple(f"{name.removesuffix(part)}{other}" for other in parts)
        if name.endswith(f".{part}") and all(other in names for other in layers):
            return layers
    return ()


def attention_of(layout: Layout, name: str, names: Container[str]) -> str | None:
    """Return the name of the attention module that a layer is a projection of; None if it is no projection.

    Args:
        layout: the family's layout.
        name: the layer's name.
        names: the names of all modules.
    """
    attention = layout.attention
    for part in (
        () if attention is None else (attention.q, attention.k, attention.v, attention.o, attention.qkv)
    ):
        if part and name.endswith(f".{part}"):
            assert attention is not None
            owner = f"{name.removesuffix(part)}{attention.name}"
            return owner if owner in names else None
    return None


def fused_parts(model: nn.Module, name: str, layer: nn.Module) -> tuple[int, ...]:
    """Return how many outputs of a fused projection are queries, keys and values; empty for other layers.

    Args:
        model: the model.
        name: the layer's name.
        layer: the module of that name.
    """
    layout = LAYOUTS.get(getattr(getattr(model, "config", None), "model_type", ""))
    attention = None if layout is None else layout.attention
    if attention is None or not attention.qkv or not name.endswith(f".{attention.qkv}"):
        return ()
    if hasattr(layer, "stock_shape"):  # some of its outputs were removed
        return ()
    owner = model.get_submodule(f"{name.removesuffix(attention.qkv)}{attention.name}")
    return heads.split_of(owner, layer_of(layer, name).out_features)


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
