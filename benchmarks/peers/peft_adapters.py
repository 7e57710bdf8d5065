"""PEFT's adapters: LoRA, LoHa, LoKr, VeRA, Uni-LoRA and TinyLoRA.

To install it: ``python -m pip install -c constraints.txt -r benchmarks/peers/requirements.txt``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.language import PROJECTIONS
from benchmarks.suite import Lab

Targets = Callable[[nn.Module], list[str]]


@dataclass(frozen=True)
class Peft:
    """A method of PEFT.

    Attributes:
        config: the name of its config class.
        options: the config's fields.
        seed: the field that takes the seed; without one, torch's generator is seeded before wrapping.
        targets: finds the names of the layers to adapt; None where the options say.
    """

    config: str
    options: Mapping[str, Any]
    seed: str = ""
    targets: Targets | None = None

    def __call__(self, model: nn.Module, seed: int) -> nn.Module:
        """Return PEFT's model around the given one."""
        import peft

        options = dict(self.options)
        if self.targets is not None:
            options["target_modules"] = self.targets(model)
        if self.seed:
            options[self.seed] = seed
        else:
            torch.manual_seed(seed)
        config = getattr(peft, self.config)(**options)
        return peft.get_peft_model(model, config)  # type: ignore[no-any-return]


def lora(rank: int, alpha: int) -> Peft:
    """Return LoRA on all linear layers."""
    return Peft("LoraConfig", {"r": rank, "lora_alpha": alpha, "target_modules": "all-linear"})


def plain_convolutions(model: nn.Module) -> list[str]:
    """Return the convolutions without groups; PEFT's methods cannot act on depthwise ones."""
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    return [name for name in plain if "squeeze_excite" not in name]


def _on_convolutions(config: str, **options: Any) -> Peft:
    return Peft(config, {"modules_to_save": ["classifier"], **options}, targets=plain_convolutions)


CONVOLUTION_LORA = _on_convolutions("LoraConfig", r=4, lora_alpha=4)
CONVOLUTION_LOHA = _on_convolutions("LoHaConfig", r=2, alpha=2)
CONVOLUTION_LOKR = _on_convolutions("LoKrConfig", r=16, alpha=16, decompose_factor=4)
CONVOLUTION_LOKR_EFFECTIVE = _on_convolutions(
    "LoKrConfig", r=16, alpha=16, decompose_factor=4, use_effective_conv2d=True
)
VERA = Peft(
    "VeraConfig",
    {"r": 256, "target_modules": PROJECTIONS, "save_projection": False},
    seed="projection_prng_key",
)
UNILORA = Peft(
    "UniLoraConfig", {"r": 4, "theta_d_length": 53760, "target_modules": PROJECTIONS}, seed="proj_seed"
)
TINYLORA = Peft(
    "TinyLoraConfig",
    {"r": 2, "u": 64, "target_modules": PROJECTIONS, "save_projection": False},
    seed="projection_seed",
)


def lora_on_linear4bit(lab: Lab) -> nn.Module:
    """Return SmolLM2 in bitsandbytes' ``Linear4bit`` with PEFT's LoRA of rank 16, as its users make it."""
    from transformers import BitsAndBytesConfig

    from benchmarks import language

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = language.load(lab, quantization_config=quantization)
    return Peft("LoraConfig", {"r": 16, "target_modules": "all-linear"})(model, seed=0)
