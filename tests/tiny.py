"""Tiny models, built from their configs on the fly, each with a batch that has a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]

VOCAB, CLASSES = 96, 4


@dataclass(frozen=True)
class Tiny:
    """One architecture: how to build it, what to feed it, which targets make sense for it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    targets: Any = "all-linear"

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights each time, in eval mode, whatever was drawn before."""
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            model = self.build()
            with torch.no_grad():
                for p in model.parameters():  # biases start at zero, norms at one: make them count
                    p.add_(0.02 * torch.randn_like(p))
        return model.to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> Batch:
        with torch.random.fork_rng():
            torch.manual_seed(4321)
            batch = self.batch()
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def perturb(model: nn.Module, scale: float = 0.05, seed: int = 7) -> nn.Module:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def _tokens() -> Batch:
    ids = torch.randint(3, VOCAB, (2, 10))
    return {"input_ids": ids, "labels": ids}


def _classified_tokens() -> Batch:
    return {"input_ids": torch.randint(3, VOCAB, (2, 10)), "labels": torch.tensor([0, 3])}


def _images() -> Batch:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 3])}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    )


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen3Config(vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, attention_bias=True, **sizes)
    return Qwen3ForCausalLM(config)


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(vocab_size=VOCAB, num_key_value_heads=2, head_dim=8, sliding_window=8, **sizes)
    return Gemma3ForCausalLM(config)


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=32, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(config)


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Phi3Config(
        vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return Phi3ForCausalLM(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=CLASSES,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=CLASSES, image_size=32
    )
    return ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=CLASSES)
    return ResNetForImageClassification(config)


TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny("llama", _llama, _tokens),
        Tiny("qwen3", _qwen3, _tokens),
        Tiny("gemma3", _gemma3, _tokens, ("all-linear", "embed_tokens")),
        Tiny("opt", _opt, _tokens),
        Tiny("phi3", _phi3, _tokens),
        Tiny("gpt2", _gpt2, _tokens),
        Tiny("bert", _bert, _classified_tokens),
        Tiny("vit", _vit, _images, ("all-linear", "all-conv")),
        Tiny("convnext", _convnext, _images, ("all-linear", "all-conv")),
        Tiny("resnet", _resnet, _images, "all-conv"),
    )
}
