"""Gather statistics block by block: one forward pass, and one backward pass where gradients are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft.anatomy import layouts
from lowrank_ft.calibration import stream
from lowrank_ft.calibration.accumulators import Accumulator, Arrival, accumulators_of
from lowrank_ft.calibration.batches import Batch, Loss, count_tokens, mask_of
from lowrank_ft.calibration.losses import summed_loss
from lowrank_ft.calibration.statistics import Moments, rows_of
from lowrank_ft.calibration.store import Store
from lowrank_ft.calibration.stream import Chain
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, Layer, layer_of

# Forward ----------------------------------------------------------------------------------------------------


def inputs(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    after: Callable[[Sequence[str]], bool] | None = None,
) -> None:
    """Store the second moment and mean of every layer's input, and every block's influence.

    Args:
        model: in eval mode.
        chain: its blocks, or None for one pass over the whole model.
        modules: the layers, by name.
        batches: the data.
        store: receives the statistics; layers that it has already are not gathered again.
        after: called with the names of a block's layers once their statistics are stored. It returns True if
            it has changed the block. The block then runs again, so that later blocks get its new output.

    Raises:
        NonFiniteError: an activation that is NaN or infinite, with the layer's name.
        TargetError: a layer that the forward never calls.
    """
    if after is None and store.names() >= set(modules):
        return
    passes = 1 if after is None else 2  # a changed block runs again
    progress = _progress(passes * count_tokens(batches), "Calibrating")
    if chain is None:
        listener = _Listener(modules, {name for name in modules if name not in store})
        for batch in batches:
            with listener.listening(batch), torch.no_grad():
                stream.forward(model, batch)
            _advance(progress, count_tokens([batch]))
        store.put("all", listener.tensors(), listener.leaders)
    else:
        _chained_inputs(chain, modules, batches, store, after, progress)
    progress.close()
    missing = [name for name in modules if name not in store]
    if missing:
        raise TargetError(
            f"{missing[0]} was never called on the calibration data ({len(missing)} such layers). Exclude it."
        )


def shared_inputs(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, str]:
    """Return for each layer the first layer with the same input, whose moments it shares; runs one forward.

    Args:
        model: in eval mode.
        modules: the layers, by name.
        batch: data; only its first sequence runs.
    """
    listener = _Listener(modules, set(modules))
    first = {key: value[:1] for key, value in batch.items()}
    with listener.listening(first), torch.no_grad():
        stream.forward(model, first)
    return listener.leaders


def _chained_inputs(
    chain: Chain,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    after: Callable[[Sequence[str]], bool] | None,
    progress: Any,
) -> None:
    """Run the blocks in order. Layers outside them are recorded with the first block, or after the last."""
    groups = stream.by_block(chain, list(modules))
    device = next(chain.model.parameters()).device
    waiting = set(groups.get(None, ()))
    states: list[Any] = [None] * len(batches)
    last = max((k for k in groups if k is not None), default=0)
    for k in [*range(len(chain) if waiting else last + 1), len(chain)]:
        is_end = k == len(chain)
        if is_end and not waiting:
            break

        def run(i: int, k: int = k, before: list[Any] = states) -> Any:
            with torch.no_grad():
                out = chain.run(k, batches[i], stream.onload(before[i], device))
            _advance(progress, count_tokens([batches[i]]) / len(chain))
            return None if k == len(chain) else stream.offload(out, chain.shelf)

        wanted = {*groups.get(k, ()), *(waiting if k == 0 or is_end else ())}
        missing = wanted - store.names()
        if not missing:
            states = [run(i) for i in range(len(batches))]
        else:
            listener = _Listener(modules, missing, None if is_end else chain.blocks[k])
            outputs = []
            for i, batch in enumerate(batches):
                with listener.listening(batch):
                    outputs.append(run(i))
                listener.compare(outputs[-1])
            states = outputs
            store.put(f"{k:04d}", listener.tensors(), listener.leaders)
        names = wanted & store.names()
        waiting -= names
        if after is not None and after([name for name in modules if name in names]) and not is_end:
            states = [run(i) for i in range(len(batches))]


class _Listener:
    """Sums up the moments of layers' inputs, and compares a block's input with its output.

    Layers with the same input share the moments of the first of them, their leader.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], names: set[str], block: nn.Module | None = None
    ) -> None:
        self.layers = {name: layer_of(modules[name]) for name in modules if name in names}
        self.moments: dict[str, Moments] = {}
        self.leaders: dict[str, str] = {}
        self.block = block
        self.block_input: Tensor | None = None
        self.mask: Tensor | None = None
        self.distance = self.count = 0.0
        self.reading = False

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[None]:
        self.mask = mask_of(batch)
        # Inputs of this forward. They are kept alive: two inputs are the same only if they are one object.
        seen: list[tuple[Tensor, str]] = []
        handles = [
            layer.module.register_forward_pre_hook(
                lambda m, args, name=name: self._record(name, args[0], seen)
            )
            for name, layer in self.layers.items()
        ]
        if self.block is not None:
            handles.append(self.block.register_forward_pre_hook(self._keep, with_kwargs=True))
        with stream.hooks(handles):
            yield

    def _record(self, name: str, x: Tensor, seen: list[tuple[Tensor, str]]) -> None:
        if self.reading:  # Layer.rows runs a convolution's forward, which calls this hook again
            return
        leader = next((other for tensor, other in seen if tensor is x and self._can_share(other, name)), name)
        self.leaders[name] = leader
        if leader != name:
            return
        seen.append((x, name))
        layer = self.layers[name]
        self.reading = True
        rows = layer.rows(x)
        self.reading = False
        diagonal = layer.kind == "embedding"
        running = self.moments.setdefault(name, Moments(layer.in_features, diagonal=diagonal))
        running.add(rows_of(layer, rows, self.mask))

    def _can_share(self, one: str, other: str) -> bool:
        """Whether two layers with the same input have the same rows; convolutions may cut other patches."""
        return not any(isinstance(self.layers[name], ConvLayer) for name in (one, other))

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.block_input = stream.hidden_argument(args, kwargs)

    def compare(self, output: Any) -> None:
        """Add the cosine distance between the block's input and its output, for the block's influence."""
        x, self.block_input = self.block_input, None
        if x is None or output is None:
            return
        y = stream.hidden_of(stream.onload(output, torch.device("cpu")))
        if x.shape != y.shape:  # a stage of a convolutional network; its influence is not defined
            return
        distances = 1 - torch.cosine_similarity(x.to(y.device, torch.float64), y.to(torch.float64), dim=-1)
        if self.mask is not None and self.mask.shape == distances.shape:
            distances = distances[self.mask.to(distances.device)]
        self.distance += float(distances.sum())
        self.count += distances.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return the statistics by name and quantity."""
        tensors = {}
        for name, running in self.moments.items():
            tensors[f"{name}|C"], tensors[f"{name}|mean"] = running.second(name).cpu(), running.mean().cpu()
            tensors[f"{name}|tokens"] = torch.tensor(running.tokens)
        if self.count:
            tensors["block|influence"] = torch.tensor(self.distance / self.count, dtype=torch.float64)
        return tensors


# Backward ---------------------------------------------------------------------------------------------------


def gradients(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    loss: Loss | None,
    fisher: bool = False,
    weighted: bool = False,
) -> None:
    """Store the second moment of the gradient at every layer's output.

    One forward pass keeps the hidden states between blocks. Then each block, from the last to the first, runs
    again with a graph and is differentiated. No gradients of parameters are computed.

    Args:
        model: in eval mode.
        chain: its blocks, or None for one pass over the whole model.
        modules: the layers, by name.
        batches: the data.
        store: receives the statistics; layers that it has already are not stored again.
        loss: a function of the model, a batch and the model's output that returns the loss, summed over
            tokens; by default :func:`summed_loss`.
        fisher: gather row and column means of the squared gradients of the weights as well.
        weighted: gather the inputs' second moments as well, with tokens weighted by their squared gradient.

    Raises:
        ConfigError: a loss that cannot be differentiated.
    """
    loss = loss or summed_loss
    if store.names() >= set(modules):
        return
    progress = _progress(count_tokens(batches), "Differentiating")

    def collecting(names: Sequence[str]) -> _Collector:
        layers = {name: layer_of(modules[name]) for name in names}
        accumulators = {
            name: accumulators_of(layer, layouts.fused_parts(model, name, modules[name]), fisher, weighted)
            for name, layer in layers.items()
        }
        return _Collector(layers, accumulators)

    with _differentiable(model):
        if chain is None:
            collector = collecting(list(modules))
            for batch in batches:
                with torch.enable_grad(), collector.listening(batch):
                    value = loss(model, batch, stream.forward(model, batch))
                    collector.backward(value, None, None)
                _advance(progress, count_tokens([batch]))
            collector.finish(store, "all")
        else:
            _chained_gradients(chain, modules, batches, store, loss, collecting, progress)
    progress.close()


def _chained_gradients(
    chain: Chain,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    loss: Loss,
    collecting: Callable[[Sequence[str]], _Collector],
    progress: Any,
) -> None:
    groups = stream.by_block(chain, list(modules))
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
                out = chain.run(k, batch, stream.onload(states[k][i], device))
            states[-1].append(stream.offload(out, chain.shelf))
            _advance(progress, count_tokens([batch]) * share)
    slopes: list[Tensor] = []
    collector = collecting(late)
    for i, batch in enumerate(batches):
        before = stream.onload(states[-1][i], device, leaf=True)
        with torch.enable_grad(), collector.listening(batch):
            value = loss(chain.model, batch, chain.run(len(chain), batch, before))
            slopes.append(collector.backward(value, None, stream.hidden_of(before)))
    collector.finish(store, f"{len(chain):04d}")
    for k in reversed(range(first, len(chain))):
        states.pop()
        collector = collecting([*groups.get(k, ()), *(early if k == 0 else ())])
        for i, batch in enumerate(batches):
            before = stream.onload(states[-1][i], device, leaf=k > 0)
            with torch.enable_grad(), collector.listening(batch):
                out = stream.hidden_of(chain.run(k, batch, before))
                slopes[i] = collector.backward(out, slopes[i], stream.hidden_of(before) if k > 0 else None)
            _advance(progress, count_tokens([batch]) * share)
        collector.finish(store, f"{k:04d}")


class _Collector:
    """Records layers' outputs, and passes the gradients with respect to them to accumulators."""

    def __init__(self, layers: Mapping[str, Layer], accumulators: Mapping[str, list[Accumulator]]) -> None:
        self.layers, self.accumulators = layers, accumulators
        self.outputs: list[tuple[str, Tensor, Tensor]] = []  # name, output, input
        self.mask: Tensor | None = None

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[None]:
        self.mask, self.outputs = mask_of(batch), []
        handles = [
            layer.module.register_forward_hook(
                lambda m, args, out, name=name: self.outputs.append((name, out, args[0]))
            )
            for name, layer in self.layers.items()
        ]
        with stream.hooks(handles):
            yield
        self.outputs = []

    def backward(self, value: Tensor, slope: Tensor | None, leaf: Tensor | None) -> Tensor:
        """Differentiate ``value``: accumulate the gradients at outputs, and return the one at ``leaf``.

        Args:
            value: the loss, or a block's output.
            slope: the gradient of the loss at ``value``; None if ``value`` is the loss.
            leaf: the block's input; None if its gradient is not needed.
        """
        if not value.requires_grad:
            raise ConfigError("The loss has no gradient: it must be computed from the model's output.")
        leaves = [] if leaf is None else [leaf]
        tensors = [*leaves, *(out for _, out, _ in self.outputs)]
        if not tensors:
            return value.new_zeros(())
        slopes = None if slope is None else slope.to(value.device)
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(value, tensors, slopes, allow_unused=True)
        with torch.no_grad():
            for (name, _, x), gradient in zip(self.outputs, gradients[len(leaves) :], strict=True):
                if gradient is not None:  # None where the loss does not depend on this output
                    arrival = Arrival(self.layers[name], x, gradient, self.mask)
                    for accumulator in self.accumulators[name]:
                        accumulator.add(arrival)
        first = None if leaf is None else gradients[0]
        return value.new_zeros(()) if first is None else first.detach()

    def finish(self, store: Store, group: str) -> None:
        """Store the statistics of the layers that the store lacks.

        The others were gathered again too: without them, rounding would differ in the last bits.
        """
        tensors, missing = {}, [name for name in self.layers if name not in store]
        for name in missing:
            for accumulator in self.accumulators[name]:
                tensors.update({f"{name}|{what}": t.cpu() for what, t in accumulator.tensors(name).items()})
        if tensors:
            store.put(group, tensors, {name: name for name in missing})


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
    """Make every floating-point parameter require a gradient, so that every output has a graph."""
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


def _advance(progress: Any, tokens: float) -> None:
    """Advance a progress bar. Tokens by block are fractions, whose rounded sum could exceed the total."""
    progress.update(min(tokens, max(progress.total - progress.n, 0)))
