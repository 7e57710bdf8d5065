"""Write the frozen checkpoints: one directory for each kind, with what it must load as.

They were written once, by the code of commit 96c83dc (schema 1), and every later
version must load them to the same bits. Run this only to add a kind: a directory that exists is left alone.

    python -m tests.frozen.make
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ft
from tests.tiny import perturb

FROZEN = Path(__file__).parent
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=24, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, **SIZES)
    return LlamaForCausalLM(config)


def opt() -> nn.Module:
    """Biases everywhere, which MoDeGPT folds and LoRD centres."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=24, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=16, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config)


def phi3() -> nn.Module:
    """Queries, keys and values in one matrix; gate and up in another."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(vocab_size=24, num_key_value_heads=1, **SPECIAL, **SIZES))


def gpt2() -> nn.Module:
    """Layers that store the transpose."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    """Convolutions, and batch norms whose statistics belong to an adapter."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return ResNetForImageClassification(config)


def plain() -> nn.Module:
    """A module that transformers knows nothing of."""
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))


BASES: dict[str, Callable[[], nn.Module]] = {f.__name__: f for f in (llama, opt, phi3, gpt2, resnet, plain)}


def base(name: str) -> nn.Module:
    """Return a base model with its frozen weights."""
    model = BASES[name]()
    model.load_state_dict(load_file(FROZEN / "bases" / f"{name}.safetensors"), strict=False)
    return model.eval()


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs of a base."""
    generator = torch.Generator().manual_seed(seed)
    if name == "resnet":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name == "plain":
        return {"input": torch.randn(4, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 24, (2, 8), generator=generator)}


def answers(model: nn.Module, name: str) -> Tensor:
    """Return what the model says."""
    with torch.no_grad():
        out = model(**batch(name))
    found: Tensor = out if isinstance(out, Tensor) else out.logits
    return found


def digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each tensor of a model, its bits, shape and type, by its name."""
    found = {}
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        content = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        found[name] = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode() + content).hexdigest()[:16]
    return found


# The kinds --------------------------------------------------------------------------------------------------


def data(name: str) -> list[dict[str, Tensor]]:
    return [batch(name, seed) for seed in range(20)]


def adapted(name: str, method: str, **options: Any) -> Callable[[], nn.Module]:
    """An adapter that was trained a little."""

    def make() -> nn.Module:
        return perturb(lowrank_ft.wrap(base(name), method, **options))

    return make


def stacked(name: str, *stages: tuple[str, dict[str, Any]], train: bool = False) -> Callable[[], nn.Module]:
    """Methods one after the other."""

    def make() -> nn.Module:
        model = base(name)
        for method, options in stages:
            lowrank_ft.wrap(model, method, **options)
        return perturb(model) if train else model.eval()

    return make


def two_adapters() -> nn.Module:
    model = perturb(lowrank_ft.wrap(base("llama"), "lora", rank=2, name="first", modules_to_save=["norm"]))
    perturb(
        lowrank_ft.wrap(model, "lora", rank=3, name="second", dora=True, targets=["q_proj", "v_proj"]), seed=8
    )
    return lowrank_ft.set_adapter(model, "first")


def merged() -> nn.Module:
    return lowrank_ft.merge(perturb(lowrank_ft.wrap(base("llama"), "lora", rank=2)))


def half() -> nn.Module:
    model = perturb(lowrank_ft.wrap(base("llama"), "lora", rank=2))
    return lowrank_ft.cast_adapters(model, "bfloat16")


SMALL: dict[str, Any] = {"ratio": 0.3, "align": 1}
CONV: dict[str, Any] = {"targets": "all-conv"}


def on(name: str) -> dict[str, Any]:
    return {"data": data(name)}


# For each directory: the base, and what makes the model that it holds.
KINDS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "lora": ("llama", adapted("llama", "lora", rank=2, modules_to_save=["norm"])),
    "lora-rslora-patterns": (
        "llama",
        adapted("llama", "lora", rank=2, scaling="rslora", alpha=3.0, rank_pattern={"q_proj": 4}),
    ),
    "lora-pissa": ("llama", adapted("llama", "lora", rank=2, init="pissa")),
    "lora-dora": ("llama", adapted("llama", "lora", rank=2, dora=True)),
    "lora-bfloat16": ("llama", half),
    "lora-embedding": ("phi3", adapted("phi3", "lora", rank=2, targets=["embed_tokens", "qkv_proj"])),
    "lora-transposed": ("gpt2", adapted("gpt2", "lora", rank=2)),
    "lora-convolutions": ("resnet", adapted("resnet", "lora", rank=2, **CONV)),
    "lora-plain-module": ("plain", adapted("plain", "lora", rank=2)),
    "two-adapters": ("llama", two_adapters),
    "nola": ("llama", adapted("llama", "nola", rank=2, bases=6)),
    "nola-4-bits": ("llama", adapted("llama", "nola", rank=2, bases=6, bits=4)),
    "nola-uniform-8-bits": ("llama", adapted("llama", "nola", rank=2, bases=6, bits=8, basis="uniform")),
    "flora": ("resnet", adapted("resnet", "flora", rank=2, rank_kernel=2, **CONV)),
    "flora-linear": ("llama", adapted("llama", "flora", rank=2)),
    "corda": ("llama", adapted("llama", "corda", rank=2, **on("llama"))),
    "lord": ("llama", stacked("llama", ("lord", {**SMALL, **on("llama")}))),
    "lord-centered": ("llama", stacked("llama", ("lord", {**SMALL, "centered": True, **on("llama")}))),
    "lord-plain-module": (
        "plain",
        stacked("plain", ("lord", {"ratio": 0.2, "ratio_of": "total", "align": 1, "objective": "weight"})),
    ),
    "modegpt": ("llama", stacked("llama", ("modegpt", {**SMALL, "low_rank": False, **on("llama")}))),
    "modegpt-biases": ("opt", stacked("opt", ("modegpt", {**SMALL, "low_rank": False, **on("opt")}))),
    "modegpt-fused": ("phi3", stacked("phi3", ("modegpt", {**SMALL, "low_rank": False, **on("phi3")}))),
    "modegpt-transposed": ("gpt2", stacked("gpt2", ("modegpt", {**SMALL, "low_rank": False, **on("gpt2")}))),
    "tucker": ("resnet", stacked("resnet", ("tucker", {**SMALL, **CONV, **on("resnet")}))),
    "nf": ("llama", stacked("llama", ("nf", {}))),
    "nf-3-bits-signed": (
        "llama",
        stacked("llama", ("nf", {"bits": 3, "codebook": "signed", "block": 24, "scale_bits": 4})),
    ),
    "nf-2-bits-fitted": ("llama", stacked("llama", ("nf", {"bits": 2, "codebook": "fitted", "block": 16}))),
    "nf-budget": ("llama", stacked("llama", ("nf", {"budget": 3.9, "solver": "lagrangian"}))),
    "nf-transposed": ("gpt2", stacked("gpt2", ("nf", {}))),
    "bitsandbytes-nf4": ("llama", stacked("llama", ("nf", {"library": "bitsandbytes", "block": 32}))),
    "bitsandbytes-int8": (
        "llama",
        stacked("llama", ("nf", {"library": "bitsandbytes", "codebook": "int8", "bits": 8})),
    ),
    "lq-lora": ("llama", stacked("llama", ("lq_lora", {"bits": 3, "rank": 2, **on("llama")}), train=True)),
    "stack-lord-nf-lora": (
        "llama",
        stacked(
            "llama",
            ("lord", {**SMALL, **on("llama")}),
            ("nf", {"bits": 3, "block": 16}),
            ("lora", {"rank": 2}),
            train=True,
        ),
    ),
    "stack-modegpt-lord-nola": (
        "llama",
        stacked(
            "llama",
            ("modegpt", {**SMALL, "low_rank": False, **on("llama")}),
            (
                "lord",
                {
                    "ratio": 0.1,
                    "align": 1,
                    "targets": ["q_proj", "down_proj"],
                    "ratio_of": "targets",
                    **on("llama"),
                },
            ),
            ("nola", {"rank": 2, "bases": 4}),
            train=True,
        ),
    ),
    "stack-tucker-flora": (
        "resnet",
        stacked(
            "resnet",
            ("tucker", {**SMALL, **CONV, **on("resnet")}),
            ("flora", {"rank": 2, **CONV}),
            train=True,
        ),
    ),
    "merged": ("llama", merged),
}

# Adapters in PEFT's own form: which kind is exported.
PEFT = {"peft-lora": "lora", "peft-pissa": "lora-pissa", "peft-convolutions": "lora-convolutions"}


def main() -> None:
    """Write what is missing."""
    (FROZEN / "bases").mkdir(exist_ok=True)
    for name, build in BASES.items():
        path = FROZEN / "bases" / f"{name}.safetensors"
        if not path.exists():
            torch.manual_seed(1234)
            model = build()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
            once = {id(t): (k, t) for k, t in reversed(model.state_dict(keep_vars=True).items())}
            save_file({k: t.detach().contiguous() for k, t in once.values()}, path)
    for kind, (name, make) in KINDS.items():
        if not (FROZEN / kind).exists():
            torch.manual_seed(0)
            model = make().eval()
            lowrank_ft.save(model, FROZEN / kind)
            record(kind, name)
    for kind, source in PEFT.items():
        if not (FROZEN / kind).exists():
            name, make = KINDS[source]
            torch.manual_seed(0)
            lowrank_ft.export(make().eval(), FROZEN / kind, "peft")
            record(kind, name)


def loaded(kind: str, name: str) -> nn.Module:
    """Load as a user would: adapters onto their base, whole models by ``from_pretrained``."""
    index = json.loads((FROZEN / kind / "lowrank_ft.json").read_text(encoding="utf-8"))
    model = base(name)
    if index["content"] == "model" and hasattr(model, "save_pretrained"):
        return type(model).from_pretrained(FROZEN / kind).eval()  # type: ignore[attr-defined]
    return lowrank_ft.load(model, FROZEN / kind).eval()


def record(kind: str, name: str) -> None:
    """Write beside a checkpoint what it must load as."""
    model = loaded(kind, name)
    expected = {"base": name, "digests": digests(model), "answers": answers(model, name).tolist()}
    (FROZEN / kind / "expected.json").write_text(json.dumps(expected) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
