"""Low-rank decomposition against its definitions, written out in float64 with explicit square roots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine, solve
from lowrank_ft.calibration.statistics import Moments
from lowrank_ft.errors import ConfigError, NonFiniteError
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.lowrank import LowRank
from tests.oracle.moments import symmetric_root

SHAPES = [(6, 9), (9, 6), (7, 7)]


def moment(features: int, seed: int, tokens: int = 200) -> Tensor:
    rows = torch.randn(tokens, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows @ torch.diag(torch.linspace(0.1, 3, features, dtype=torch.float64)) + 0.5
    return rows.T @ rows / tokens


def weight_of(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(W: Tensor, C: Tensor, G: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best approximation under the metric, and the error that it leaves, by the textbook."""
    left, right = symmetric_root(G), symmetric_root(C)
    u, s, vt = torch.linalg.svd(left @ W @ right, full_matrices=False)
    kept = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return torch.linalg.inv(left) @ kept @ torch.linalg.inv(right), float((s[rank:] ** 2).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["none", "C", "G", "both", "diagonal", "WtGW"])
def test_decomposition_is_the_optimum(shape: tuple[int, int], metric: str) -> None:
    W, rank = weight_of(shape), 3
    C = moment(shape[1], 1) if metric in ("C", "both", "WtGW") else None
    if metric == "diagonal":
        C = torch.rand(shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    G = moment(shape[0], 2) if metric in ("G", "both", "WtGW") else None
    given: dict[str, Any] = {"G": G}
    if metric == "WtGW":
        given = {"WtGW": W.T @ G @ W}
    found = solve.decompose(W, C, **given)
    factors = found.truncate(rank)
    full_C = torch.eye(shape[1]).double() if C is None else torch.diag(C) if C.dim() == 1 else C
    full_G = torch.eye(shape[0]).double() if G is None else G
    best, error = reference(W, full_C, full_G, rank)
    # Eigenvalues of a Gram matrix carry an error of n·eps·σ₁², 1e-14 of the largest here; solving with the
    # roots multiplies it by their condition, at most 1e4 for these moments.
    torch.testing.assert_close(factors.B @ factors.A, best, rtol=1e-9, atol=1e-9)
    assert found.error(rank) == pytest.approx(error, rel=1e-9)
    assert solve.weighted_error(W - factors.B @ factors.A, C, G) == pytest.approx(error, rel=1e-9)
    balanced = factors.balanced()
    torch.testing.assert_close(balanced.B @ balanced.A, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(balanced.B.T @ balanced.B, balanced.A @ balanced.A.T, rtol=1e-9, atol=1e-9)


def test_signs_do_not_depend_on_the_solver() -> None:
    W = weight_of((40, 64))
    full, fast = solve.decompose(W), solve.decompose(W, rank=3)
    # A residual of 1e-6 λ₁ moves an eigenvector by 1e-6 λ₁ over its gap, which here is above λ₁/100.
    torch.testing.assert_close(full.truncate(3).B, fast.truncate(3).B, rtol=0, atol=1e-4)
    B = full.truncate(3).B
    assert (B.gather(0, B.abs().argmax(0, keepdim=True)) > 0).all()


def test_the_randomized_solver_is_used_only_where_its_residual_is_small() -> None:
    n = 64
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    steep = (q * torch.logspace(0, -12, n, dtype=torch.float64)) @ q.T
    flat = (q * torch.linspace(1, 0.9, n, dtype=torch.float64)) @ q.T
    for matrix in (steep, flat):
        values, vectors = solve.eigenpairs(matrix, 4, randomized=True)
        assert (matrix @ vectors - vectors * values).norm(dim=0).max() <= 1e-6 * values[0]
        torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix)[-4:].flip(0), rtol=1e-6, atol=0)


def test_factor_spd_says_what_it_took() -> None:
    good = moment(5, 0)
    found = solve.factor_spd(good)
    assert (found.method, found.ridge) == ("cholesky", 0.0)
    torch.testing.assert_close(found.lower @ found.lower.T, good)
    torch.testing.assert_close(found.lower @ found.solve(good), good)
    torch.testing.assert_close(found.lower.T @ found.solve_transposed(good), good)

    thin = torch.randn(3, 6, dtype=torch.float64)
    singular = thin.T @ thin
    found = solve.factor_spd(singular)
    assert 0 < found.ridge <= 1e-6
    # What was added to the diagonal is all that differs.
    torch.testing.assert_close(
        found.lower @ found.lower.T, singular, rtol=0, atol=2e-6 * float(singular.diagonal().mean())
    )

    indefinite = (
        good
        - 0.01 * good.diagonal().mean() * torch.eye(5)
        - torch.diag(torch.linalg.eigvalsh(good)[:1].expand(5))
    )
    found = solve.factor_spd(indefinite)
    assert found.method == "eigh"
    assert torch.equal(found.lower, found.lower.tril())
    assert torch.linalg.eigvalsh(found.lower @ found.lower.T).min() > 0

    with pytest.raises(NonFiniteError, match="NaN"):
        solve.factor_spd(good * float("nan"))
    with pytest.raises(ConfigError, match="no data reached"):
        solve.factor_spd(torch.zeros(3, 3, dtype=torch.float64))


# The method -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers whose inputs have a mean, and a loss."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(8, 12, bias=bias)
        self.down = nn.Linear(12, 6, bias=bias)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.down(torch.relu(self.up(x) + 1.0)),)


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(4)
    return [{"x": torch.randn(50, 8, dtype=torch.float64) + 1.0} for _ in range(3)]


def inputs_of(net: Net, name: str) -> Tensor:
    x = torch.cat([b["x"] for b in batches()])
    return x if name == "up" else torch.relu(net.up(x) + 1.0).detach()


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("name", ["up", "down"])
def test_predicted_error_is_the_measured_error(centered: bool, name: str) -> None:
    """Of the layer's outputs on the calibration data, to 1e-6, the ridge being zero."""
    dense = Net()
    net = lowrank_ft.wrap(
        Net(),
        "lord",
        targets=name,
        ratio=0.15,
        align=1,
        objective="output",
        centered=centered,
        data=batches(),
    )
    (facts,) = engine.stages_of(net)[0]["layers changed"]
    assert facts.get("ridge", 0.0) == 0.0
    layer, stock = getattr(net, name), getattr(dense, name)
    assert isinstance(layer, LowRank)
    x = inputs_of(dense, name)
    outputs = stock(x).detach()
    offset = outputs.mean(0) if centered else stock.bias.detach()
    reference_outputs = outputs - offset
    measured = float(((layer(x).detach() - outputs) ** 2).sum() / (reference_outputs**2).sum()) ** 0.5
    assert facts["relative error"] == pytest.approx(measured, rel=1e-6)


def test_centred_is_atomic_feature_mimicking() -> None:
    """``B = U_r`` of the outputs' covariance, ``A = U_rᵀ W``, bias ``U_r U_rᵀ b + (I − U_r U_rᵀ) E[y]``."""
    dense = Net()
    net = lowrank_ft.wrap(
        Net(), "lord", targets="down", ratio=0.2, align=1, objective="output", data=batches()
    )
    y = dense.down(inputs_of(dense, "down")).detach()
    covariance = torch.cov(y.T, correction=0)
    U = torch.linalg.eigh(covariance).eigenvectors[:, -net.down.rank :]
    B, A = net.down.factors()
    torch.testing.assert_close(B @ A, U @ U.T @ dense.down.weight, rtol=1e-8, atol=1e-8)
    expected = U @ U.T @ dense.down.bias + (torch.eye(6) - U @ U.T) @ y.mean(0)
    torch.testing.assert_close(net.down.bias, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["up", "down"])
def test_centred_is_never_worse_than_uncentred(name: str) -> None:
    dense, errors = Net(), {}
    for centered in (True, False):
        net = lowrank_ft.wrap(
            Net(),
            "lord",
            targets=name,
            ratio=0.2,
            align=1,
            objective="output",
            centered=centered,
            data=batches(),
        )
        x = inputs_of(dense, name)
        difference = (getattr(net, name)(x) - getattr(dense, name)(x)).detach()
        errors[centered] = float((difference**2).sum())
    assert errors[True] <= errors[False] * (1 + 1e-12)


def test_the_prediction_is_the_quadratic_form_of_the_gradients() -> None:
    """``½ ‖G^½ ΔW C^½‖²`` with G from explicit gradients of the summed loss."""
    dense = Net()

    def loss(model: Any, batch: Any, output: Any) -> Tensor:
        return (output[0] ** 3).sum()

    net = lowrank_ft.wrap(
        Net(),
        "lord",
        targets="down",
        ratio=0.2,
        align=1,
        data=batches(),
        loss=loss,
        calibration={"gradient_samples": 1000},
    )
    (facts,) = engine.stages_of(net)[0]["layers changed"]
    x = inputs_of(dense, "down")
    y = dense.down(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((y**3).sum(), y)
    G = gradient.T @ gradient / len(x)
    mean = x.mean(0)
    C = x.T @ x / len(x) - torch.outer(mean, mean)
    B, A = net.down.factors()
    ridged = G + 1e-4 * G.diagonal().mean() * torch.eye(6)
    predicted = 0.5 * solve.weighted_error((dense.down.weight - B @ A).detach(), C, ridged)
    assert facts["predicted"] == pytest.approx(predicted, rel=1e-8)


def test_embeddings_take_their_mean_row_into_the_bias() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(20, 6).double()
            self.embed.weight.data += 1.0
            self.head = nn.Linear(6, 2).double()

        def forward(self, ids: Tensor) -> tuple[Tensor]:
            return (self.head(self.embed(ids)),)

    ids = torch.randint(0, 15, (4, 30), generator=torch.Generator().manual_seed(1))
    dense = Table()
    net = lowrank_ft.wrap(
        Table(), "lord", targets="embed", ratio=0.2, ratio_of="total", align=1, objective="output",
        data=[{"ids": ids}],
    )  # fmt: skip
    rows = dense.embed(ids).reshape(-1, 6).detach()
    mean = rows.mean(0)
    U = torch.linalg.eigh(torch.cov(rows.T, correction=0)).eigenvectors[:, -net.embed.rank :]
    expected = (dense.embed.weight - mean) @ U @ U.T + mean
    torch.testing.assert_close(net.embed(torch.arange(20)), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(net.embed.dense()(ids), net.embed(ids))
    assert layer_of(net.embed).kind == "embedding"


def test_moments_leave_padding_out_and_keep_one_triangle() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 700, dtype=torch.float64)
    running = Moments(700)
    for part in x.reshape(15, 700).split(4):
        running.add(part)
    flat = x.reshape(15, 700)
    torch.testing.assert_close(running.second("x"), flat.T @ flat / 15)
    torch.testing.assert_close(running.mean(), flat.mean(0))
