"""What model families call their parts: rows of data, not classes."""

from __future__ import annotations

from torch import nn

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
