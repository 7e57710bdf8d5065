"""LoRA and its relatives against their papers' equations, in float64, with code of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowrank_ft
from lowrank_ft.modules.adapted import Adapted
from tests.tiny import perturb

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums of under 1e3 terms: rounding stays below 1e-13

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear-3d": (lambda: nn.Linear(12, 9, bias=False), (2, 5, 12)),
    "conv1d-gpt2": (lambda: Conv1D(9, 12), (2, 5, 12)),
    "embedding": (lambda: nn.Embedding(12, 9, padding_idx=3), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3, padding=1), (2, 6, 10)),
    "conv2d": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False), (2, 6, 8, 8)),
    "conv2d-dilated": (lambda: nn.Conv2d(6, 9, 3, dilation=2), (2, 6, 9, 9)),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 8, 8)),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 9, 3, padding="same"), (2, 4, 5, 5, 5)),
}


def layer_and_input(kind: str) -> tuple[nn.Sequential, Tensor]:
    build, shape = LAYERS[kind]
    model = nn.Sequential(build()).double()
    x = torch.randint(0, 12, shape) if kind == "embedding" else torch.randn(shape, dtype=torch.float64)
    return model, x


def stored(weight: Tensor, kind: str, matrix: Tensor) -> Tensor:
    """An out × in matrix in the layer's own layout."""
    return matrix.T if kind in ("conv1d-gpt2", "embedding") else matrix.reshape(weight.shape)


def dense(model: nn.Sequential, kind: str, delta: Tensor, x: Tensor) -> Tensor:
    """The definition: the layer with W + ΔW."""
    weight = model[0].weight.detach()
    tensors = {"weight": weight + stored(weight, kind, delta)}
    return torch.func.functional_call(model[0], tensors, (x,))


def factors(host: Adapted) -> tuple[Tensor, Tensor]:
    delta = host.deltas["default"]
    return delta.A, delta.B


def trained(model: nn.Module) -> nn.Module:
    """Move the adapter as training could: an embedding's padding row stays zero."""
    perturb(model, 0.5)
    if isinstance(model[0].base, nn.Embedding):
        with torch.no_grad():
            model[0].deltas["default"].A[:, model[0].base.padding_idx] = 0
    return model


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_forward_and_gradients_equal_the_dense_definition(kind: str, scaling: str) -> None:
    model, x = layer_and_input(kind)
    reference = model[0]
    alpha, rank = 3.0, 4
    scale = alpha / (math.sqrt(rank) if scaling == "rslora" else rank)
    twin = nn.Sequential(reference)
    plain = {k: v.clone() for k, v in reference.state_dict().items()}
    lowrank_ft.wrap(model, "lora", rank=rank, alpha=alpha, scaling=scaling, targets="0")
    trained(model)
    A, B = factors(model[0])
    if x.is_floating_point():
        x.requires_grad_()
    assert all(torch.equal(v, plain[k]) for k, v in twin[0].state_dict().items())

    out = model(x)
    wanted = dense(twin, kind, scale * B @ A, x)
    torch.testing.assert_close(out, wanted, **EXACT)

    probe = torch.randn_like(out)
    inputs = [A, B] + ([x] if x.requires_grad else [])
    ours = torch.autograd.grad(out, inputs, probe)
    theirs = torch.autograd.grad(wanted, inputs, probe)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("kind", LAYERS)
def test_merged_weight_is_w_plus_ba(kind: str) -> None:
    model, x = layer_and_input(kind)
    weight = model[0].weight.detach().clone()
    lowrank_ft.wrap(model, "lora", rank=3, alpha=6.0, targets="0")
    trained(model)
    A, B = factors(model[0])
    wanted = weight + stored(weight, kind, 2.0 * (B @ A).detach())
    out = model(x)
    lowrank_ft.merge(model)
    torch.testing.assert_close(model[0].weight, wanted, **EXACT)
    torch.testing.assert_close(model(x), out, **EXACT)


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_is_equation_5_with_the_norm_out_of_the_gradient(kind: str) -> None:
    model, x = layer_and_input(kind)
    base = nn.Sequential(model[0])
    weight = model[0].weight.detach()
    matrix = weight.T if kind in ("conv1d-gpt2", "embedding") else weight.flatten(1)
    lowrank_ft.wrap(model, "lora", rank=3, alpha=6.0, dora=True, targets="0")
    delta = model[0].deltas["default"]
    torch.testing.assert_close(delta.magnitude, matrix.norm(dim=1), **EXACT)
    trained(model)

    direction = matrix + 2.0 * delta.B @ delta.A
    updated = delta.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    out, wanted = model(x), dense(base, kind, updated - matrix, x)
    torch.testing.assert_close(out, wanted, **EXACT)
    probe = torch.randn_like(out)
    inputs = [delta.A, delta.B, delta.magnitude]
    for a, b in zip(
        torch.autograd.grad(out, inputs, probe), torch.autograd.grad(wanted, inputs, probe), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    lowrank_ft.merge(model)
    torch.testing.assert_close(model(x), out, **EXACT)


def test_pissa_starts_from_the_leading_singular_triples() -> None:
    model = nn.Sequential(nn.Linear(20, 14, bias=False)).double()
    W = model[0].weight.detach().clone()
    lowrank_ft.wrap(model, "lora", rank=5, alpha=10.0, init="pissa", targets="0")
    A, B = factors(model[0])
    U, S, Vt = torch.linalg.svd(W)
    leading = U[:, :5] * S[:5] @ Vt[:5]
    torch.testing.assert_close(2.0 * B @ A, leading, **EXACT)
    torch.testing.assert_close(A @ A.T, torch.diag(S[:5] / 2), **EXACT)  # balanced, rows orthogonal
    torch.testing.assert_close(B.T @ B, torch.diag(S[:5] / 2), **EXACT)
    x = torch.randn(3, 20, dtype=torch.float64)
    perturb(model, 0.5)  # then it computes (W − leading) x + scale · B A x, as the paper's form does
    torch.testing.assert_close(model(x), x @ (W - leading + 2.0 * B @ A).T, **EXACT)


def test_olora_starts_from_the_qr_factors() -> None:
    model = nn.Sequential(nn.Linear(20, 14, bias=False)).double()
    W = model[0].weight.detach().clone()
    lowrank_ft.wrap(model, "lora", rank=5, alpha=10.0, init="olora", targets="0")
    A, B = factors(model[0])
    torch.testing.assert_close(B.T @ B, torch.eye(5, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(B @ (B.T @ W), B @ A, **EXACT)  # A is R's first rows
    assert all(column[column.abs().argmax()] > 0 for column in B.T)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (8, 8)])
def test_truncated_svd_equals_the_full_one_and_is_sign_fixed(shape: tuple[int, int]) -> None:
    from lowrank_ft.solve import truncated_svd

    M = torch.randn(shape, dtype=torch.float64)
    U, S, Vt = truncated_svd(M, 5)
    u, s, vt = torch.linalg.svd(M, full_matrices=False)
    torch.testing.assert_close(S, s[:5], **EXACT)
    torch.testing.assert_close(U * S @ Vt, u[:, :5] * s[:5] @ vt[:5], rtol=1e-9, atol=1e-10)
    assert all(column[column.abs().argmax()] > 0 for column in U.T)
    again = truncated_svd(M.clone(), 5)
    assert torch.equal(U, again[0])


def test_kaiming_start_has_the_variance_of_linears_own() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    lowrank_ft.wrap(model, "lora", rank=64, targets="0")
    A, B = factors(model[0])
    assert A.abs().max() <= 1 / math.sqrt(400)
    assert A.var().item() == pytest.approx(1 / (3 * 400), rel=0.05)  # 25,600 draws: 1 % standard error
    assert not B.any()


def test_layers_of_one_shape_start_differently() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    lowrank_ft.wrap(model, "lora", rank=4)
    assert not torch.equal(model[0].deltas["default"].A, model[1].deltas["default"].A)


def test_dropout_drops_the_updates_input_alone() -> None:
    model = nn.Sequential(nn.Linear(2000, 3)).double().train()
    base = model[0]
    lowrank_ft.wrap(model, "lora", rank=2, dropout=0.25, targets="0")
    perturb(model, 0.5)
    A, B = factors(model[0])
    x = torch.randn(4, 2000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    out = model(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.25, True)
    wanted = base(x) + dropped @ A.T @ B.T
    torch.testing.assert_close(out, wanted, **EXACT)
    probe = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, [x, A, B], probe), torch.autograd.grad(wanted, [x, A, B], probe), strict=True
    ):
        torch.testing.assert_close(a, b, **EXACT)
    assert 0.2 < (dropped == 0).double().mean() < 0.3
    torch.testing.assert_close(model.eval()(x), base(x) + x @ A.T @ B.T, **EXACT)


# Rounding of merged against unmerged ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_merged_and_unmerged_lie_within_the_rounding_bound(dtype: torch.dtype, tokens: int) -> None:
    """Both against float64, elementwise, within a bound from the number of roundings.

    With u the unit roundoff of the dtype (2⁻²⁴; 2⁻⁹ for bfloat16), v = 2⁻²⁴ that of the float32 sums, n and r
    the lengths of the sums, and |·| taken entrywise:

    * merged: the weight is rounded once (u), the sum of n products errs by n·v, the output is rounded (u):
      ``(2u + n v) |x| (|W| + s|B||A|)``;
    * unmerged: A and B are cast (u each), x Aᵀ is summed (n v) and rounded (u), its product with B is summed
      (r v), the dense output is summed (n v) and rounded (u) before the update is added and rounded (u):
      ``(2u + n v) |x||W| + (4u + (n + r) v) s|x||A||B|``.

    Second-order terms are covered by a tenth.
    """
    n, out, r, s = 96, 40, 8, 2.0
    model = nn.Sequential(nn.Linear(n, out, bias=False)).to(dtype)
    lowrank_ft.wrap(model, "lora", rank=r, alpha=s * r, targets="0")
    perturb(model, 0.2)
    A, B = (t.detach().double() for t in factors(model[0]))
    W = model[0].base.weight.detach().double()
    x = torch.randn(tokens, n, dtype=dtype)
    X = x.double()
    exact = X @ (W + s * B @ A).T
    unmerged = model(x).double()
    lowrank_ft.merge(model)
    merged = model(x).double()

    u, v = torch.finfo(dtype).eps / 2, 2.0**-24
    dense_part, update_part = X.abs() @ W.abs().T, s * X.abs() @ A.abs().T @ B.abs().T
    bound_merged = 1.1 * (2 * u + n * v) * (dense_part + update_part)
    bound_unmerged = 1.1 * ((2 * u + n * v) * dense_part + (4 * u + (n + r) * v) * update_part)
    assert ((merged - exact).abs() <= bound_merged).all()
    assert ((unmerged - exact).abs() <= bound_unmerged).all()
    assert ((merged - unmerged).abs() <= bound_merged + bound_unmerged).all()
    assert (merged - unmerged).abs().max() > 0  # the bound is about something
