"""Gather statistics: one pass forward, and where gradients are wanted one pass back, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft import layouts
from lowrank_ft.calibration import stream
from lowrank_ft.calibration.batches import Batch, Loss, count_tokens, fingerprint, mask_of
from lowrank_ft.calibration.statistics import Moments, rows_of
from lowrank_ft.calibration.store import Store
from lowrank_ft.calibration.stream import Chain
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, layer_of

# Forward ----------------------------------------------------------------------------------------------------


def inputs(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    after: Callable[[Sequence[str]], bool] | None = None,
) -> None:
    """Put the second moment and mean of every layer's input, and every block's influence, into the store.

    Args:
        model: in eval mode.
        chain: its blocks, or None for one pass over the whole model.
        modules: the layers, by name.
        batches: the data.
        store: where finished blocks are; layers that are there already are not gathered again.
        after: called with a block's layers once their statistics are there. Where it answers True it has
            changed the block, which then runs again, so that later blocks see what it gives now.

    Raises:
        NonFiniteError: an activation that is NaN or infinite, with the layer's name.
        TargetError: a layer that the forward never calls.
    """
    if after is None and store.names() >= set(modules):
        return
    passes = 1 if after is None else 2  # a changed block runs again
    progress = _progress(passes * count_tokens(batches), "Calibrating")
    if chain is None:
        listener = _Listener(modules, set(modules) - store.names())
        for batch in batches:
            with listener.listening(batch), torch.no_grad():
                stream.forward(model, batch)
            _advance(progress, count_tokens([batch]))
        store.put("all", listener.tensors(), listener.leaders)
    else:
        _chained_inputs(chain, modules, batches, store, after, progress)
    progress.close()
    missing = [name for name in modules if name not in store.names()]
    if missing:
        raise TargetError(
            f"{missing[0]} was never called on the calibration data ({len(missing)} such layers). Exclude it."
        )


def _chained_inputs(
    chain: Chain,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
    after: Callable[[Sequence[str]], bool] | None,
    progress: Any,
) -> None:
    """Walk the blocks; what lies outside them is caught before the first one or after the last one."""
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
            found = []
            for i, batch in enumerate(batches):
                with listener.listening(batch):
                    found.append(run(i))
                listener.compare(found[-1])
            states = found
            store.put(f"{k:04d}", listener.tensors(), listener.leaders)
        names = wanted & store.names()
        waiting -= names
        if after is not None and after([name for name in modules if name in names]) and not is_end:
            states = [run(i) for i in range(len(batches))]


class _Listener:
    """Listens to layers' inputs and adds up their moments; and to what a block is given."""

    def __init__(
        self, modules: Mapping[str, nn.Module], names: set[str], block: nn.Module | None = None
    ) -> None:
        self.layers = {name: layer_of(modules[name]) for name in modules if name in names}
        self.moments: dict[str, Moments] = {}
        self.leaders: dict[str, str] = {}
        self.block = block
        self.given: Tensor | None = None
        self.mask: Tensor | None = None
        self.distance = self.count = 0.0
        self.reading = False

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[None]:
        self.mask = mask_of(batch)
        seen: list[tuple[Tensor, str]] = []  # inputs of this forward; holding them keeps them apart
        handles = [
            layer.module.register_forward_pre_hook(lambda m, args, name=name: self._hear(name, args[0], seen))
            for name, layer in self.layers.items()
        ]
        if self.block is not None:
            handles.append(self.block.register_forward_pre_hook(self._keep, with_kwargs=True))
        with stream.hooks(handles):
            yield

    def _hear(self, name: str, x: Tensor, seen: list[tuple[Tensor, str]]) -> None:
        if self.reading:  # a convolution's patches come from its own forward
            return
        leader = next((other for tensor, other in seen if tensor is x and self._alike(other, name)), name)
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

    def _alike(self, one: str, other: str) -> bool:
        """Whether two layers with one input see the same rows: convolutions differ in their patches."""
        return not any(isinstance(self.layers[name], ConvLayer) for name in (one, other))

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.given = stream.given_to(args, kwargs)

    def compare(self, output: Any) -> None:
        """Add the distance between what the block was given and what it gave back."""
        x, self.given = self.given, None
        if x is None or output is None:
            return
        y = stream.hidden_of(stream.onload(output, torch.device("cpu")))
        if x.shape != y.shape:  # a stage of a convolutional network, say
            return
        apart = 1 - torch.cosine_similarity(x.to(y.device, torch.float64), y.to(torch.float64), dim=-1)
        if self.mask is not None and self.mask.shape == apart.shape:
            apart = apart[self.mask.to(apart.device)]
        self.distance += float(apart.sum())
        self.count += apart.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return what was added up, by name and quantity."""
        found = {}
        for name, running in self.moments.items():
            found[f"{name}|C"], found[f"{name}|mean"] = running.second(name).cpu(), running.mean().cpu()
            found[f"{name}|tokens"] = torch.tensor(running.tokens)
        if self.count:
            found["block|influence"] = torch.tensor(self.distance / self.count, dtype=torch.float64)
        return found


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
        fisher: gather row and column means of the squared gradients of the weights as well.
        weighted: gather the inputs' second moments as well, tokens counted by their squared gradient.

    Raises:
        ConfigError: a loss that cannot be differentiated.
    """
    loss = loss or summed_loss
    if store.names() >= set(modules):
        return
    progress = _progress(count_tokens(batches), "Differentiating")
    parts = {name: layouts.fused_parts(model, name, module) for name, module in modules.items()}
    collecting = partial(_Collector, modules, parts=parts, fisher=fisher, weighted=weighted)
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
    """Listens to layers' outputs, and adds up the second moments of the gradients that arrive there."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        names: Sequence[str],
        parts: Mapping[str, tuple[int, ...]],
        fisher: bool,
        weighted: bool,
    ) -> None:
        self.layers = {name: layer_of(modules[name]) for name in names}
        self.parts = {name: parts[name] for name in names if parts[name]}
        self.heads = {name: (Moments(q), Moments(k)) for name, (q, k, _) in self.parts.items()}
        self.fisher = fisher
        self.weighted = {
            name: Moments(layer.in_features)
            for name, layer in self.layers.items()
            if weighted and layer.kind in ("linear", "transposed-linear")
        }
        self.weights = dict.fromkeys(self.weighted, 0.0)
        self.squares: dict[str, tuple[Tensor, Tensor]] = {}
        self.diagonals: dict[str, Tensor] = {}
        self.moments = {
            name: Moments(min(layer.out_features, layer.in_features)) for name, layer in self.layers.items()
        }
        self.outputs: list[tuple[str, Tensor, Tensor]] = []
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
        """Differentiate ``value``; take the gradients at the outputs in, and return the one at ``leaf``."""
        if not value.requires_grad:
            raise ConfigError("The loss has no gradient: it must be computed from the model's output.")
        ends = [] if leaf is None else [leaf]
        tensors = [*ends, *(out for _, out, _ in self.outputs)]
        if not tensors:
            return value.new_zeros(())
        slopes = None if slope is None else slope.to(value.device)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(value, tensors, slopes, allow_unused=True)
        with torch.no_grad():
            for (name, _, x), gradient in zip(self.outputs, found[len(ends) :], strict=True):
                layer = self.layers[name]
                if gradient is None:  # this output leads to nothing that the loss is made of
                    continue
                if self.fisher and layer.kind != "embedding":
                    self._square(name, x, gradient)
                rows = rows_of(layer, layer.output_rows(gradient), self.mask)
                if name in self.weighted:
                    self._weigh(name, rows_of(layer, layer.rows(x), self.mask), rows)
                if name in self.parts:  # queries and keys apart: of a tall layer G is not kept
                    for moments, part in zip(
                        self.heads[name], torch.split(rows, list(self.parts[name]), -1), strict=False
                    ):
                        moments.add(part)
                if layer.out_features > layer.in_features:
                    self._add_diagonal(name, rows)
                    rows = rows @ layer.matrix()
                self.moments[name].add(rows)
        return value.new_zeros(()) if leaf is None or found[0] is None else found[0].detach()

    def _add_diagonal(self, name: str, rows: Tensor) -> None:
        """Add the squares of the gradient at each output of a tall layer, whose G is not kept."""
        added = rows.square().sum(0, dtype=torch.float64)
        self.diagonals[name] = self.diagonals[name] + added if name in self.diagonals else added

    def _weigh(self, name: str, rows: Tensor, gradient: Tensor) -> None:
        """Add the input's second moment, each token counted by its squared gradient."""
        norms = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm(dim=1, keepdim=True)
        self.weighted[name].add(rows * norms)
        self.weights[name] += float(norms.square().sum(dtype=torch.float64))

    def _square(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add the squared gradient of the weight, one for each sequence."""
        if self.mask is not None and self.mask.shape == gradient.shape[:-1]:
            gradient = gradient * self.mask[..., None].to(gradient)
        sequences = gradient.shape[0] if gradient.dim() > 2 else 1
        for g, rows in zip(
            gradient.reshape(sequences, -1, gradient.shape[-1]),
            x.reshape(sequences, -1, x.shape[-1]),
            strict=True,
        ):
            square = (g.T @ rows).square_()
            added = square.mean(1, dtype=torch.float64), square.mean(0, dtype=torch.float64)
            before = self.squares.get(name)
            self.squares[name] = added if before is None else (before[0] + added[0], before[1] + added[1])

    def finish(self, store: Store, group: str) -> None:
        """Store what is not there yet. All is gathered again: less to differentiate, other last bits."""
        tensors = {}
        missing = {name: layer for name, layer in self.layers.items() if name not in store.names()}
        for name, layer in missing.items():
            running = self.moments[name]
            if running.tokens == 0:
                raise TargetError(
                    f"The output of {name} does not reach the loss, so nothing says what it is worth. "
                    f"Exclude it, or pass a loss= that it reaches."
                )
            what = "pulled" if layer.out_features > layer.in_features else "G"
            tensors[f"{name}|{what}"] = running.second(name).cpu()
            if name in self.diagonals:
                tensors[f"{name}|G_diagonal"] = self.diagonals[name].cpu() / running.tokens
            for part, moments in zip("qk", self.heads.get(name, ()), strict=False):
                tensors[f"{name}|G_{part}"] = moments.second(name).cpu()
        for name, running in self.weighted.items():
            if name in missing:  # as a mean over tokens that count by their weights
                mean = running.tokens / max(self.weights[name], 1e-300)
                tensors[f"{name}|C_weighted"] = running.second(name).cpu() * mean
        for name, (rows, columns) in self.squares.items():
            if name not in missing:
                continue
            tensors[f"{name}|fisher_rows"], tensors[f"{name}|fisher_columns"] = rows.cpu(), columns.cpu()
        if tensors:
            store.put(group, tensors, {name: name for name in missing})


def summed_loss(model: nn.Module, batch: Batch, output: Any) -> Tensor:
    """Return the loss of a batch, summed: what the default output gradients are gradients of.

    Cross-entropy with the batch's ``labels``, or with the next token of a causal language model. For an
    encoder without labels, ``⟨output, ε⟩`` with ε standard normal: its gradients' second moment makes the
    metric that of the output's squared error.
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
    """``⟨output, ε⟩`` over everything an encoder gives back (hidden states, a pooled output)."""
    held = output.values() if hasattr(output, "values") else [main_output(output)]
    generator = torch.Generator().manual_seed(int(fingerprint([batch])[:12], 16))  # another ε for every batch
    total, mask = main_output(output).new_zeros(()), mask_of(batch)
    for tensor in held:
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            continue
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
        if mask is not None and tensor.dim() == 3 and mask.shape == tensor.shape[:2]:
            noise = noise * mask[..., None].to(noise)
        total = total + (tensor * noise).sum()
    return total


# Without gradients ------------------------------------------------------------------------------------------

_NOISE = 0.1  # standard deviation of the probe, relative to the output's root mean square


def sensitivities(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
) -> None:
    """Put into the store how far the model's output moves for each unit of squared error at every layer's.

    By forward passes alone: white noise is added to one layer's output at a time, and the divergence of the
    model's output (:func:`divergence`, in nats per token) is divided by the noise's energy. Unlike the loss's
    own rise the divergence is never negative, needs no labels, and has no first-order part. Blocks before the
    layer do not run again.

    Args:
        model: in eval mode.
        chain: its blocks, or None.
        modules: the layers, by name.
        batches: the data; every layer runs them once.
        store: where finished blocks are.
    """
    modules = {name: module for name, module in modules.items() if name not in store.names()}
    if not modules:
        return
    groups = stream.by_block(chain, list(modules))
    tokens, device = count_tokens(batches), next(model.parameters()).device
    progress = tqdm(total=len(modules), desc="Probing", unit="layer", leave=False)
    states: list[Any] = [None] * len(batches)

    def outputs(k: int) -> Iterator[Any]:
        """The model's output on each batch, blocks before ``k`` left out."""
        for i, batch in enumerate(batches):
            before = stream.onload(states[i], device) if k else None
            out = stream.forward(model, batch) if chain is None else chain.resume(k, batch, before)
            yield out

    for k in range(1 if chain is None else len(chain)):
        names = list(groups.get(None if chain is None else k, ()))
        if chain is not None and k == 0:
            names += groups.get(None, ())
        with torch.no_grad():
            if names:
                dense = list(outputs(k))
                found = {n: _probe(modules[n], partial(outputs, k), dense, batches) / tokens for n in names}
                tensors = {f"{n}|sensitivity": torch.tensor(v, dtype=torch.float64) for n, v in found.items()}
                store.put(f"{k:04d}", tensors, {name: name for name in names})
            if chain is not None:
                states = [
                    stream.offload(chain.run(k, batch, stream.onload(states[i], device)), chain.shelf)
                    for i, batch in enumerate(batches)
                ]
        progress.update(len(names))
    progress.close()


def _probe(
    module: nn.Module,
    outputs: Callable[[], Iterator[Any]],
    dense: Sequence[Any],
    batches: Sequence[Batch],
) -> float:
    """Return the summed divergence per unit of mean squared error at a module's output."""
    generator = torch.Generator().manual_seed(0)
    energies: list[float] = []

    def disturb(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        spread = _NOISE * out.double().square().mean().sqrt()
        noise = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) * spread
        energies.append(float(noise.square().sum(-1).mean()))
        return out + noise.to(out.dtype)

    with stream.hooks([module.register_forward_hook(disturb)]):
        moved = sum(
            divergence(before, after, mask_of(batch))
            for before, after, batch in zip(dense, outputs(), batches, strict=True)
        )
    energy = sum(energies) / max(len(energies), 1)
    return moved / energy if energy > 0 else 0.0


def divergence(before: Any, after: Any, mask: Tensor | None) -> float:
    """Return how far a model's output has moved, summed over real positions.

    Args:
        before: what the model returned. With logits the divergence is ``KL(before ‖ after)``, in nats;
            otherwise ``½ ‖Δ‖²`` of the hidden states.
        after: what it returns now.
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
    """Return a model's logits, or where it has none its first tensor."""
    if isinstance(output, Tensor):
        return output
    return cast(Tensor, output.logits if hasattr(output, "logits") else output[0])


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


def _advance(progress: Any, tokens: float) -> None:
    """Move a bar on; tokens by block are fractions, whose rounding must not carry it past its end."""
    progress.update(min(tokens, max(progress.total - progress.n, 0)))
