"""What a method is: the answers to *which sites*, *what structure*, *what values*."""

from __future__ import annotations

import enum
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import nn

from lowrank_ft.anatomy.sites import Site, check_patterns, lookup
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError
from lowrank_ft.modules.delta import DeltaNode
from lowrank_ft.modules.layer import find_layer
from lowrank_ft.quant.scheme import Scheme
from lowrank_ft.solve.allocation import Handle, Option
from lowrank_ft.structure.node import Node

FactorType = Literal["auto", "float32", "bfloat16", "float16"]


class Family(enum.Enum):
    """When a method may be applied: compress, then quantise, then adapt."""

    COMPRESSOR = 0
    QUANTIZER = 1
    ADAPTER = 2


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method. Subclasses are frozen dataclasses whose field docstrings are the help texts."""

    seed: int = 0
    """Seed of the method's random start. The global random state is neither read nor touched."""


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Options that every adapter has."""

    modules_to_save: tuple[str, ...] = ()
    """Modules to train in full beside the adapter (a new head, norms), by name, name ending or glob."""


@dataclass(frozen=True)
class LowRankConfig(AdapterConfig):
    """Options of adapters that have a rank."""

    rank: int = 16
    """Rank of the update, from 1 to min(out, in) of the layer."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of layers that differ: name, name ending, glob or "re:…" to rank; the first match counts."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise ConfigError(f"The rank must be at least 1, but {where} is {rank}.")

    def check_patterns(self, sites: Sequence[Site]) -> None:
        """Raise ``TargetError`` for a pattern that matches no site."""
        names = [name for site in sites for name in site.names]
        check_patterns(self.rank_pattern, names, "rank_pattern")


@dataclass(frozen=True)
class CompressorConfig(MethodConfig):
    """Options that every compressor has."""

    ratio: float = 0.2
    """Share of the parameters to remove, between 0 and 1."""
    ratio_of: Literal["blocks", "total", "targets"] = "blocks"
    """What the ratio is a share of: all parameters but embeddings and head, all of them, or those of the
    targeted layers."""
    align: int = 8
    """Ranks are multiples of this; large GPUs like 128, narrow models 8."""
    min_saving: float = 0.0
    """Layers stay as they are unless at least this share of their parameters goes; set it where small savings
    cost more speed than they are worth."""
    calibration: Calibration = field(default_factory=Calibration)
    """The data that the method looks at."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ConfigError(f"The ratio is the share to remove, between 0 and 1, but is {self.ratio}.")
        if not 0 <= self.min_saving < 1:
            raise ConfigError(f"min_saving must lie between 0 and 1, but is {self.min_saving}.")
        if self.align < 1:
            raise ConfigError(f"align must be at least 1, but is {self.align}.")

    def budget(self, targeted: int, counts: Counts) -> int:
        """Return how many parameters the targeted layers may keep.

        Args:
            targeted: how many parameters they have.
            counts: the parameters of the model.

        Raises:
            ConfigError: they have fewer than are to be removed.
        """
        whole = {"total": counts.total, "blocks": counts.blocks, "targets": targeted}[self.ratio_of]
        left = targeted - round(self.ratio * whole)
        if left <= 0:
            raise ConfigError(
                f"Removing {self.ratio:.0%} of {whole:,} parameters is more than the targeted layers have "
                f"({targeted:,}). Lower the ratio, or target more layers (embeddings?)."
            )
        return left


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Need(enum.Enum):
    """A statistic that a method asks for."""

    INPUT = "second moment and mean of each layer's input"
    OUTPUT_GRADIENT = "second moment of the gradient at each layer's output"
    WEIGHTED_INPUT = "second moment of each layer's input, tokens counted by the gradient at its output"
    FISHER = "row and column means of the squared gradient of each layer's weight"
    SENSITIVITY = "divergence of the model's output per squared error at each layer's, without gradients"


@dataclass(frozen=True)
class Counts:
    """Parameters of a model, tied ones once.

    Attributes:
        total: all of them.
        blocks: all but embeddings and head.
        tensors: how many parameters and buffers there are.
        bytes: what they take.
    """

    total: int
    blocks: int
    tensors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Share:
    """What :meth:`Method.choose` gives one site.

    Attributes:
        rank: of what is put there; None leaves the site as it is, or its layers to ``ranks``.
        predicted: predicted rise of the model's loss, in nats per token, where the method predicts one.
        ranks: for a group whose layers are factored one by one, their ranks by name; beside a rank, how it
            divides over the widths of a group that has several.
        scheme: how the site's weights are stored, where they are quantised.
        handle: tensors that :meth:`Method.options` computed for :meth:`Method.values`; may be empty.
    """

    rank: int | None = None
    predicted: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    scheme: Scheme | None = None
    handle: Handle = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, option: Option, *, predicts: bool) -> Share:
        """Return the share that an option stands for.

        Args:
            option: what was chosen.
            predicts: whether its loss is in nats, and so a prediction.
        """
        predicted = option.loss if predicts else None
        return cls(option.rank, predicted, option.ranks, option.scheme, option.handle)


Statistics = Mapping[str, SiteStatistics]
Options = Mapping[str, Sequence[Option]]  # by the name of the site


class Method(ABC, Generic[ConfigT]):
    """One way to adapt or compress a model. A new method is one file with one subclass.

    Attributes:
        name: how users call it.
        family: when it may be applied.
        Config: its options.
        trains: whether it leaves an adapter: all of that family do.
        spending: fields of the config that say how a budget is spent, and change nothing in an option.
            Options in the cache serve a run with other values of these.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[bool] = False
    spending: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """An adapter trains."""
        super().__init_subclass__(**kwargs)
        if getattr(cls, "family", None) is Family.ADAPTER:
            cls.trains = True

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def sites(self, model: nn.Module, chosen: list[Site]) -> list[Site]:
        """Return the sites that the targeted layers form; by default one for each layer.

        Args:
            model: the model.
            chosen: one site for each targeted layer, in module order.

        Raises:
            TargetError: layers that do not form what the method acts on.
        """
        return chosen

    def check(self, site: Site) -> None:
        """Raise ``TargetError`` where the method cannot act on a site; called before any work is done."""

    def needs(self) -> frozenset[Need]:
        """Return the statistics that the method asks for with its present options; none by default."""
        return frozenset()

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return the options of one site, of which :meth:`choose` takes one; none by default.

        The engine calls it for one site after another, or for several at once in threads, keeps the answer
        in the calibration cache, and drops the site's statistics afterwards. So it looks at nothing but its
        arguments and the config.

        Args:
            site: where the method acts.
            statistics: what :meth:`needs` asked for, by layer name.
        """
        return []

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Decide what each site gets; by default one rank for all, and the exceptions by pattern.

        Args:
            sites: where the method acts.
            options: what :meth:`options` returned, by the site's name.
            counts: the model's parameters.

        Raises:
            ConfigError: a rank above min(out, in) of its layer; a budget that cannot be met.
            TargetError: a pattern in the config that matches no site.
        """
        if not isinstance(self.config, LowRankConfig):
            return [Share() for _ in sites]
        self.config.check_patterns(sites)
        return [Share(self._rank(site)) for site in sites]

    def _rank(self, site: Site) -> int:
        assert isinstance(self.config, LowRankConfig)
        name = site.names[0]
        rank = lookup(self.config.rank_pattern, name, self.config.rank)
        layer = find_layer(site.modules[0])
        if layer is not None and rank > layer.max_rank:
            raise ConfigError(
                f"Rank {rank} is above min(out, in) = {layer.max_rank} of {name}. Lower it there with "
                f"rank_pattern={{{name!r}: {layer.max_rank}}}, or exclude the layer."
            )
        return rank

    @abstractmethod
    def structure(self, site: Site, share: Share) -> Mapping[str, Node]:
        """Return for each name of the site the node of its replacement. Pure: reads shapes, never values."""

    def deltas(self, site: Site, share: Share) -> Mapping[str, DeltaNode]:
        """Return adapters to put on the modules of :meth:`structure`; none by default.

        For a method that makes both at once. The engine puts them together under the adapter's name.
        """
        return {}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any] | None:
        """Fill the modules that :meth:`structure` led to; the site still has its old ones.

        Args:
            site: the site.
            new: the modules to fill, by name.
            statistics: what :meth:`needs` asked for, by layer name.
            handle: the chosen option's, computed from these same statistics. None where the statistics have
                changed since (sequential calibration): everything is then computed again.

        Returns:
            Facts for the report, plain data, or None.
        """


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU random generator that depends on the seed and the module's name alone.

    So a start does not depend on the order of modules, on the device, or on what was drawn before.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
