"""Gather statistics: one pass forward, and where gradients are wanted one pass back, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft.calibration import stream
from lowrank_ft.calibration.batches import Batch, count_tokens, mask_of
from lowrank_ft.calibration.statistics import Moments, rows_of
from lowrank_ft.calibration.store import Store
from lowrank_ft.calibration.stream import Chain
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import layer_of

Loss = Callable[[nn.Module, Batch, Any], Tensor]


# Forward ----------------------------------------------------------------------------------------------------


def inputs(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    after: Callable[[Sequence[str]], bool] | None = None,
) -> None:
    """Put the second moment and mean of every layer's input into the store.

    Args:
        model: in eval mode.
        chain: its blocks, or None for one pass over the whole model.
        modules: the layers, by name.
        batches: the data.
        store: where finished blocks are; those that are there already are not gathered again.
        after: called with a block's layers once their statistics are there. Where it answers True it has
            changed the block, which then runs again, so that later blocks see what it gives now.

    Raises:
        NonFiniteError: an activation that is NaN or infinite, with the layer's name.
        TargetError: a layer that the forward never calls.
    """
    if after is None and store.names() >= set(modules):
        return
    groups = stream.by_block(chain, list(modules))
    steps = 1 if chain is None else len(chain)
    passes = 1 if after is None else 2  # a changed block runs again
    progress = _progress(passes * count_tokens(batches), "Calibrating")
    waiting = set(groups.get(None, ()))
    if chain is None:
        _gather_inputs(store, "all", modules, waiting, batches, lambda i, b: stream.forward(model, b))
        progress.update(progress.total)
    else:
        device = next(model.parameters()).device
        states: list[Any] = [None] * len(batches)
        last = max((k for k in groups if k is not None), default=0)
        for k in range(last + 1 if not waiting else steps):
            before = states

            def run(i: int, batch: Batch, k: int = k, before: list[Any] = before) -> Any:
                out = chain.run(k, batch, stream.onload(before[i], device))
                progress.update(count_tokens([batch]) / steps)
                return stream.offload(out)

            wanted = {*groups.get(k, ()), *(waiting if k == 0 else ())}
            states, found = _gather_inputs(store, f"{k:04d}", modules, wanted, batches, run)
            waiting -= found
            if after is not None and after([name for name in modules if name in found]):
                states = [run(i, batch) for i, batch in enumerate(batches)]
        if waiting:
            ends = states
            _, found = _gather_inputs(
                store,
                "end",
                modules,
                waiting,
                batches,
                lambda i, b: chain.run(len(chain), b, stream.onload(ends[i], device)),
            )
            waiting -= found
            if after is not None:
                after([name for name in modules if name in found])
    progress.close()
    missing = [name for name in modules if name not in store.names()]
    if missing:
        raise TargetError(
            f"{missing[0]} was never called on the calibration data ({len(missing)} such layers). Exclude it."
        )


def _gather_inputs(
    store: Store,
    group: str,
    modules: Mapping[str, nn.Module],
    wanted: set[str],
    batches: Sequence[Batch],
    run: Callable[[int, Batch], Any],
) -> tuple[list[Any], set[str]]:
    """Run all batches and store the moments of the inputs that came by.

    Returns what the runs gave, and the names of the layers that were called.
    """
    if store.has(group):
        return [_quiet(run, i, batch) for i, batch in enumerate(batches)], set(store.leaders(group))
    moments: dict[str, Moments] = {}
    leaders: dict[str, str] = {}
    results = []
    for i, batch in enumerate(batches):
        seen: list[tuple[Tensor, str]] = []  # inputs of this forward; holding them keeps them apart

        def listen(name: str, x: Tensor, batch: Batch = batch, seen: list[tuple[Tensor, str]] = seen) -> None:
            leader = next((other for tensor, other in seen if tensor is x), name)
            leaders[name] = leader
            if leader != name:
                return
            seen.append((x, name))
            layer = layer_of(modules[name])
            diagonal = layer.kind == "embedding"
            running = moments.setdefault(name, Moments(layer.in_features, diagonal=diagonal))
            running.add(rows_of(layer, x, mask_of(batch)))

        handles = [
            modules[name].register_forward_pre_hook(lambda m, args, name=name: listen(name, args[0]))
            for name in wanted
        ]
        with stream.hooks(handles):
            results.append(_quiet(run, i, batch))
    tensors = {}
    for name, running in moments.items():
        tensors[f"{name}|C"], tensors[f"{name}|mean"] = running.second(name).cpu(), running.mean().cpu()
        tensors[f"{name}|tokens"] = torch.tensor(running.tokens)
    store.put(group, tensors, leaders)
    return results, set(leaders)


def _quiet(run: Callable[[int, Batch], Any], i: int, batch: Batch) -> Any:
    with torch.no_grad():
        return run(i, batch)


# Backward ---------------------------------------------------------------------------------------------------


def gradients(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    loss: Loss | None,
) -> None:
    """Put the second moment of the gradient at every layer's output into the store.

    Forward once, keeping what lies between blocks; then backward from the last block to the first, each run
    again for its graph. Nothing is computed for parameters.

    Args:
        model: in eval mode.
        chain: its blocks, or None for one pass over the whole model.
        modules: the layers, by name.
        batches: the data.
        store: where finished blocks are.
        loss: gives the loss, summed over its tokens, from the model, a batch and the model's output; by
            default :func:`summed_loss`.

    Raises:
        ConfigError: a loss that cannot be differentiated.
    """
    loss = loss or summed_loss
    groups = stream.by_block(chain, list(modules))
    if store.names() >= set(modules):
        return
    progress = _progress(count_tokens(batches), "Differentiating")
    with _differentiable(model):
        if chain is None:
            collector = _Collector(modules, list(modules))
            for batch in batches:
                with torch.enable_grad(), collector.listening(batch):
                    value = loss(model, batch, stream.forward(model, batch))
                    collector.backward(value, None, None)
                progress.update(count_tokens([batch]))
            collector.finish(store, "all")
        else:
            _chained_gradients(chain, modules, groups, batches, store, loss, progress)
    progress.close()


def _chained_gradients(
    chain: Chain,
    modules: Mapping[str, nn.Module],
    groups: Mapping[int | None, list[str]],
    batches: Sequence[Batch],
    store: Store,
    loss: Loss,
    progress: Any,
) -> None:
    device = next(chain.model.parameters()).device
    first = min((k for k in groups if k is not None), default=len(chain))
    early = [name for name in groups.get(None, ()) if _runs_before(chain, modules[name], batches[0])]
    first = 0 if early else first
    late = [name for name in groups.get(None, ()) if name not in early]
    share = 1 / (2 * len(chain) - first)
    states: list[list[Any]] = [[None] * len(batches)]
    for k in range(len(chain)):
        states.append([])
        for i, batch in enumerate(batches):
            with torch.no_grad():
                states[-1].append(stream.offload(chain.run(k, batch, stream.onload(states[k][i], device))))
            progress.update(count_tokens([batch]) * share)
    slopes: list[Tensor] = []
    collector = _Collector(modules, late)
    for i, batch in enumerate(batches):
        before = stream.onload(states[-1][i], device, leaf=True)
        with torch.enable_grad(), collector.listening(batch):
            value = loss(chain.model, batch, chain.run(len(chain), batch, before))
            slopes.append(collector.backward(value, None, stream.hidden_of(before)))
    collector.finish(store, "end")
    for k in reversed(range(first, len(chain))):
        states.pop()
        collector = _Collector(modules, [*groups.get(k, ()), *(early if k == 0 else ())])
        for i, batch in enumerate(batches):
            before = stream.onload(states[-1][i], device, leaf=k > 0)
            with torch.enable_grad(), collector.listening(batch):
                out = stream.hidden_of(chain.run(k, batch, before))
                slopes[i] = collector.backward(out, slopes[i], stream.hidden_of(before) if k > 0 else None)
            progress.update(count_tokens([batch]) * share)
        collector.finish(store, f"{k:04d}")


class _Collector:
    """Listens to layers' outputs, and adds up the second moments of the gradients that arrive there."""

    def __init__(self, modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
        self.layers = {name: layer_of(modules[name]) for name in names}
        self.moments = {
            name: Moments(min(layer.out_features, layer.in_features)) for name, layer in self.layers.items()
        }
        self.outputs: list[tuple[str, Tensor]] = []
        self.mask: Tensor | None = None

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[None]:
        self.mask, self.outputs = mask_of(batch), []
        handles = [
            layer.module.register_forward_hook(
                lambda m, args, out, name=name: self.outputs.append((name, out))
            )
            for name, layer in self.layers.items()
        ]
        with stream.hooks(handles):
            yield
        self.outputs = []

    def backward(self, value: Tensor, slope: Tensor | None, leaf: Tensor | None) -> Tensor:
        """Differentiate ``value``; take the gradients at the outputs in, and return the one at ``leaf``."""
        if not value.requires_grad:
            raise ConfigError("The loss has no gradient: it must be computed from the model's output.")
        ends = [] if leaf is None else [leaf]
        tensors = [*ends, *(out for _, out in self.outputs)]
        if not tensors:
            return value.new_zeros(())
        found = torch.autograd.grad(value, tensors, None if slope is None else slope.to(value.device))
        with torch.no_grad():
            for (name, _), gradient in zip(self.outputs, found[len(ends) :], strict=True):
                layer = self.layers[name]
                rows = rows_of(layer, gradient, self.mask)
                if layer.out_features > layer.in_features:
                    rows = rows @ layer.matrix()
                self.moments[name].add(rows)
        return found[0].detach()

    def finish(self, store: Store, group: str) -> None:
        tensors = {}
        for name, running in self.moments.items():
            layer = self.layers[name]
            what = "pulled" if layer.out_features > layer.in_features else "G"
            tensors[f"{name}|{what}"] = running.second(name).cpu()
        if tensors:
            store.put(group, tensors, {name: name for name in self.layers})


def summed_loss(model: nn.Module, batch: Batch, output: Any) -> Tensor:
    """Return the loss of a batch, summed: what the default output gradients are gradients of.

    Cross-entropy with the batch's ``labels``, or with the next token of a causal language model. For an
    encoder without labels, ``⟨output, ε⟩`` with ε standard normal: its gradients' second moment makes the
    metric that of the output's squared error.
    """
    logits = output.logits if hasattr(output, "logits") else output[0]
    labels = batch.get("labels")
    causal = logits.dim() == 3 and hasattr(model, "can_generate") and cast(Any, model).can_generate()
    if labels is None and causal:
        mask = mask_of(batch)
        labels = batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(~mask, -100)
    if labels is None:
        generator = torch.Generator().manual_seed(int(logits.numel()))
        noise = torch.randn(logits.shape, generator=generator).to(logits.device, logits.dtype)
        mask = mask_of(batch)
        if mask is not None and mask.shape == logits.shape[:2]:
            noise = noise * mask[..., None].to(noise)
        return cast(Tensor, (logits * noise).sum())
    labels = labels.to(logits.device)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum"
    )


# Small things -----------------------------------------------------------------------------------------------


def _runs_before(chain: Chain, module: nn.Module, batch: Batch) -> bool:
    """Whether a module outside the blocks runs before the first one."""
    called: list[bool] = []
    handle = module.register_forward_pre_hook(lambda m, args: called.append(True))
    with stream.hooks([handle]), torch.no_grad():
        chain.run(0, {key: value[:1] for key, value in batch.items()}, None)
    return bool(called)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Let every floating-point parameter ask for a gradient, so that every output has a graph."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _progress(tokens: int, what: str) -> Any:
    return tqdm(total=tokens, desc=what, unit="tok", unit_scale=True, leave=False)
