"""The default loss, and the divergence between two outputs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_ft.calibration.batches import Batch, fingerprint, mask_of


def summed_loss(model: nn.Module, batch: Batch, output: Any) -> Tensor:
    """Return the default loss of a batch, summed over its tokens.

    Cross-entropy with the batch's ``labels``, or with the next token of a causal language model. For an
    encoder without labels, ``⟨output, ε⟩`` with ε standard normal: with the second moment of its gradients as
    G, weighted errors estimate the squared error of the model's output.
    """
    logits = main_output(output)
    labels = batch.get("labels")
    causal = logits.dim() == 3 and hasattr(model, "can_generate") and cast(Any, model).can_generate()
    if labels is None and causal:
        mask = mask_of(batch)
        labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(~mask, -100)
    if labels is None:
        return _projected(output, batch)
    labels = labels.to(logits.device)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum"
    )


def _projected(output: Any, batch: Batch) -> Tensor:
    """``⟨output, ε⟩`` over all outputs of an encoder (hidden states, a pooled output)."""
    outputs = output.values() if isinstance(output, Mapping) else [main_output(output)]
    # The seed depends on the batch, so each batch has a different ε.
    generator = torch.Generator().manual_seed(int(fingerprint([batch])[:12], 16))
    total, mask = main_output(output).new_zeros(()), mask_of(batch)
    for tensor in outputs:
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if mask is not None and tensor.dim() == 3 and mask.shape == tensor.shape[:2]:
            noise = noise * mask[..., None].to(noise)
        total = total + (tensor * noise).sum()
    return total


def divergence(before: Any, after: Any, mask: Tensor | None) -> float:
    """Return the divergence between two outputs of a model, summed over real positions.

    Args:
        before: the model's output before the change. With logits the divergence is ``KL(before ‖ after)``, in
            nats; otherwise ``½ ‖Δ‖²`` of the hidden states.
        after: its output after the change.
        mask: ``(batch, tokens)``, true where a position is real.
    """
    x, y = main_output(before), main_output(after)
    keep = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if mask is not None and mask.shape == keep.shape:
        keep = mask.to(x.device)
    total = 0.0
    parts = zip(torch.split(x[keep], 128), torch.split(y[keep], 128), strict=True)
    for p, q in parts:  # float64 logits are large
        if hasattr(before, "logits"):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
        else:
            total += 0.5 * float((p.double() - q.double()).square().sum())
    return max(total, 0.0)


def main_output(output: Any) -> Tensor:
    """Return a model's logits, or its first output tensor if it has no logits."""
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output.logits if hasattr(output, "logits") else output[0])
