"""PEFT's CorDA: its statistics, its solve, and its wrap.

To install it: ``python -m pip install -c constraints.txt -r benchmarks/peers/requirements.txt``.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from benchmarks.language import PROJECTIONS, forward

METHODS = {"instruction": "ipm", "knowledge": "kpm"}


class PeftCorDA:
    """One model, on which PEFT finds CorDA's starts; see ``benchmarks.suites.corda.CorDA``."""

    batch_size = 1  # its hook takes one sequence at a time

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], rank: int) -> None:
        from peft.tuners.lora import corda

        self._corda, self._model, self._batches, self._rank = corda, model, batches, rank
        self._gathered = False
        targets = corda.target_modules(model, self._config("instruction"))
        self._weights = {name: module.weight.detach().clone() for name, module in targets}

    def start(self, mode: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each layer's start as two factors; the first call gathers the statistics."""
        config = self._config(mode)
        if not self._gathered:
            for _, module in self._corda.target_modules(self._model, config):
                module.rank = self._rank
            self._corda.calib_cov_distribution(
                self._model, config, lambda: forward(self._model, self._batches), None, None
            )
            self._gathered = True
        for _, module in self._corda.target_modules(self._model, config):
            module.corda_method = METHODS[mode]
        self._corda.collect_eigens(self._model, config, False)
        self._corda.crop_corda_eigens(self._model, config)

        import peft

        self._wrapped: Any = peft.get_peft_model(self._model, config)
        starts = {}
        for name, module in self._wrapped.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                B, A = (part["default"].weight.detach().clone() for part in (module.lora_B, module.lora_A))
                starts[name.removeprefix("base_model.model.")] = (B, A)
        return starts

    def undo(self) -> None:
        """Take the adapter off, and put back the weights that its start changed."""
        self._model = self._wrapped.unload()
        for name, weight in self._weights.items():
            cast(nn.Linear, self._model.get_submodule(name)).weight.data.copy_(weight)

    def _config(self, mode: str) -> Any:
        """Return the config; PEFT takes no keyword for all linear layers here."""
        from peft import LoraConfig
        from peft.tuners.lora.config import CordaConfig

        return LoraConfig(
            r=self._rank,
            lora_alpha=self._rank,
            target_modules=PROJECTIONS,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=METHODS[mode]),
        )


def solve(weight: Tensor, moment: Tensor) -> None:
    """Run PEFT's solve of one layer; it is the same for both modes."""
    from peft.tuners.lora import corda

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    layer.register_buffer("covariance_matrix", moment)
    corda.collect_eigens_for_layer(layer, None)
