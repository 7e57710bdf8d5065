"""The fused layer: same mathematics, fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_ft
from lowrank_ft.modules.fused import low_rank_linear
from tests.tiny import TINY, perturb


def saved_bytes(loss: Tensor, model: nn.Module) -> tuple[dict[int, int], list[Tensor]]:
    """Storages that the graph behind ``loss`` keeps, without the model's own, and the tensors in them."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    tensors = []
    for tensor in graph_tensors(loss):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
    return found, tensors


def graph_tensors(loss: Tensor) -> Iterator[Tensor]:
    stack, seen = [loss.grad_fn], set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept = [getattr(node, a) for a in dir(node) if a.startswith("_saved_")]
        kept += list(getattr(node, "saved_tensors", ()))
        yield from (t for t in kept if isinstance(t, Tensor))
        stack += [parent for parent, _ in node.next_functions]


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def swiglu() -> SwiGLU:
    return perturb(lowrank_ft.wrap(SwiGLU(), "lora", rank=4), 0.3)  # type: ignore[return-value]


def gradients(model: nn.Module, x: Tensor, run: Any = None) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    out = (run or model)(x)
    return list(torch.autograd.grad(out.square().sum(), [x, *parameters]))


def test_the_product_is_not_kept_and_gives_the_same_bits() -> None:
    model = swiglu()
    x = torch.randn(7, 16, requires_grad=True)
    product = (F.silu(model.gate(x)) * model.up(x)).detach()
    _, kept = saved_bytes(model(x).sum(), model)
    assert not any(t.shape == product.shape and torch.equal(t, product) for t in kept)
    again = gradients(model, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # hooks switch it off
        plain = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    model = swiglu()
    x = torch.randn(7, 16, requires_grad=True)
    plain = gradients(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip([x.grad, *[p.grad for p in parameters]], plain, strict=True))


def test_saving_on_cpu_hooks_give_the_same_bits() -> None:
    model = swiglu()
    x = torch.randn(7, 16, requires_grad=True)
    plain = gradients(model, x)
    with torch.autograd.graph.save_on_cpu():
        hooked = gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(hooked, plain, strict=True))


def test_a_factor_changed_in_place_is_an_error_in_backward() -> None:
    layer = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2), 0.3)
    a, b = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    first, second = a * 1.0, b * 1.0
    out = layer(first * second)
    with torch.no_grad():
        second.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("make", [lambda x: x * 2.0, lambda x: x * torch.ones(8), lambda x: x.detach() * x])
def test_other_products_are_kept_as_they_are(make: Any) -> None:
    layer = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(8, 8)), "lora", rank=2), 0.3)
    reference = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8, requires_grad=True)
    out = layer(make(x))
    lowrank_ft.merge(layer)
    reference = layer
    (ours,) = torch.autograd.grad(out.sum(), [x])
    (theirs,) = torch.autograd.grad(reference(make(x)).sum(), [x])
    torch.testing.assert_close(ours, theirs)


def test_q_k_and_v_keep_their_input_once() -> None:
    class QKV(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return torch.cat([self.q(x), self.k(x), self.v(x)], -1)

    model = lowrank_ft.wrap(QKV().bfloat16(), "lora", rank=2)
    x = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    storages, _ = saved_bytes(model(x).sum(), model)
    kept = sorted(n for n in storages.values() if n >= 64 * 16 * 2)
    # x for the norm's backward and the norm's output for A, both in bfloat16, and nothing else of that size.
    assert kept == [64 * 16 * 2] * 2


def test_makes_no_temporary_of_the_outputs_size() -> None:
    """Forward and backward allocate the output, the input's gradient, and otherwise only small tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tokens, n, out = 128, 48, 64
    sizes: list[tuple[str, int]] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = {id(a.untyped_storage()) for a in args if isinstance(a, Tensor)}
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, Tensor)
                and result.untyped_storage().data_ptr() not in known
                and before is not None
            ):
                sizes.append((str(func), result.numel()))
            return result

    model = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(n, out)), "lora", rank=4, targets="0"))
    x = torch.randn(tokens, n, requires_grad=True)
    probe = torch.randn(tokens, out)
    with Allocations():
        y = model(x)
        torch.autograd.grad(y, [x, *[p for p in model.parameters() if p.requires_grad]], probe)
    large = [entry for entry in sizes if entry[1] >= tokens * min(n, out)]
    assert [size for _, size in large] == [tokens * out, tokens * n], large


def test_no_gradient_is_computed_for_inputs_that_need_none() -> None:
    A, B = torch.randn(2, 6, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    x, weight = torch.randn(3, 6), torch.randn(5, 6)
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    out = low_rank_linear(x, weight, None, A, B)
    with Count():
        out.sum().backward()
    products = [c for c in calls if "mm" in c]
    assert len(products) == 3, products  # dy B, and the gradients of A and B: none for x, none for W
    assert weight.grad is None


@pytest.mark.parametrize("backward_inside", [False, True])
def test_bf16_autocast_forward_and_backward(backward_inside: bool) -> None:
    tiny = TINY["llama"]
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2))
    batch = tiny.inputs()
    exact = model(**batch).loss
    exact.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-7)  # a few roundings of 2⁻⁹
    got = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n in wanted])
    assert got.dtype == torch.float32
    cosine = F.cosine_similarity(got, torch.cat([g.flatten() for g in wanted.values()]), dim=0)
    assert cosine > 0.99


def test_autocast_start_is_the_identity_to_the_bit() -> None:
    tiny = TINY["gpt2"]
    model, batch = tiny.model(), tiny.inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = model(**batch).logits
        after = lowrank_ft.wrap(model, "lora", rank=2)(**batch).logits
    assert torch.equal(before, after)


def test_a_hooked_base_is_called_so_that_its_hooks_run() -> None:
    model = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(8, 6)), "lora", rank=2))
    x = torch.randn(3, 8)
    fused = model(x)
    seen = []
    handle = model[0].base.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    torch.testing.assert_close(model(x), fused)
    assert seen == [torch.Size([3, 6])]
    handle.remove()


def test_a_base_whose_weight_is_unfrozen_gets_its_gradient() -> None:
    model = perturb(lowrank_ft.wrap(nn.Sequential(nn.Linear(8, 6)), "lora", rank=2))
    model[0].base.weight.requires_grad_(True)
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].base.weight.grad is not None


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo does, to trace one
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "resnet"])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"dropout": 0.1}], ids=str)
def test_compiles_to_one_graph(name: str, options: dict[str, Any]) -> None:
    tiny = TINY[name]
    targets = "all-linear" if options.get("dropout") and name != "resnet" else tiny.targets
    model = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2, targets=targets, **options))
    batch = tiny.inputs()
    if name == "gpt2":
        batch.pop(
            "labels"
        )  # transformers' loss for it logs a warning, which breaks the stock model's graph too
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(model)(**batch)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(**batch)
    traced = compiled(**batch)
    torch.testing.assert_close(traced.logits, eager.logits, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(out.logits.square().sum(), parameters) for out in (traced, eager))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
