"""The base class of methods: a method answers *which sites*, *what structure* and *what values*."""

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
    """The kind of a method, which decides the order: first compress, then quantise, then adapt."""

    COMPRESSOR = 0
    QUANTIZER = 1
    ADAPTER = 2


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method. Subclasses are frozen dataclasses; their field docstrings are the help texts."""

    seed: int = 0
    """Seed of the method's random start. The global random state is neither read nor changed."""


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
    """Exceptions to `rank`: from name, name ending, glob or "re:…" to rank; the first match counts."""

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
    """Ranks are multiples of this: 128 is fast on large GPUs, 8 suits narrow models."""
    min_saving: float = 0.0
    """A layer stays unchanged unless at least this share of its parameters is removed. Set it if small
    savings are not worth the speed that they cost."""
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
            targeted: how many parameters the targeted layers have.
            counts: the parameters of the model.

        Raises:
            ConfigError: the targeted layers have no more parameters than are to be removed.
        """
        base = {"total": counts.total, "blocks": counts.blocks, "targets": targeted}[self.ratio_of]
        left = targeted - round(self.ratio * base)
        if left <= 0:
            raise ConfigError(
                f"Removing {self.ratio:.0%} of {base:,} parameters is more than the targeted layers have "
                f"({targeted:,}). Lower the ratio, or target more layers (embeddings?)."
            )
        return left


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Need(enum.Enum):
    """A statistic that a method asks for."""

    INPUT = "second moment and mean of each layer's input"
    OUTPUT_GRADIENT = "second moment of the gradient at each layer's output"
    WEIGHTED_INPUT = "second moment of each layer's input, tokens weighted by the gradient at its output"
    FISHER = "row and column means of the squared gradient of each layer's weight"
    SENSITIVITY = "divergence of the model's output per squared error at each layer's, without gradients"


@dataclass(frozen=True)
class Counts:
    """Parameters of a model. Tied parameters count once.

    Attributes:
        total: all of them.
        blocks: all but embeddings and head.
        tensors: how many parameters and buffers there are.
        bytes: how many bytes these take.
    """

    total: int
    blocks: int
    tensors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Share:
    """The rank and storage that :meth:`Method.choose` decides on for one site.

    Attributes:
        rank: the rank or width of the replacement; None if the site stays unchanged, or its layers have
            ``ranks``.
        predicted: predicted rise of the model's loss, in nats per token; None if the method predicts none.
        ranks: without ``rank``, the rank of each layer by name, in a group whose layers are factored one by
            one; with it, the parts of ``rank`` by width, in a group with several widths.
        scheme: how the site's weights are stored, if they are quantised.
        handle: tensors that :meth:`Method.options` computed for :meth:`Method.values`; may be empty.
    """

    rank: int | None = None
    predicted: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    scheme: Scheme | None = None
    handle: Handle = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, option: Option, *, predicts: bool) -> Share:
        """Return the share for a chosen option.

        Args:
            option: the option.
            predicts: whether the option's loss is a prediction, in nats per token.
        """
        predicted = option.loss if predicts else None
        return cls(option.rank, predicted, option.ranks, option.scheme, option.handle)


Statistics = Mapping[str, SiteStatistics]
Options = Mapping[str, Sequence[Option]]  # by the name of the site


class Method(ABC, Generic[ConfigT]):
    """One way to adapt or compress a model. A new method is one file with one subclass.

    Attributes:
        name: the method's name for users.
        family: its kind.
        Config: the class of its options.
        trains: whether it leaves an adapter on the model, as all methods of the adapter family do.
        spending: fields of the config that decide how a budget is spent, but not what the options are.
            Cached options are reused when only these fields differ.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    Config: ClassVar[type[MethodConfig]]
    trains: ClassVar[bool] = False
    spending: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Set ``trains`` on every subclass of the adapter family."""
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
        """Raise ``TargetError`` if the method cannot act on a site; called before any work is done."""

    def needs(self) -> frozenset[Need]:
        """Return the statistics that the method needs with its present options; none by default."""
        return frozenset()

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return the options of one site, from which :meth:`choose` takes one; none by default.

        The engine calls this for one site after another, or in threads for several at once. It keeps the
        options in the calibration cache, and drops the site's statistics afterwards. So the options must
        depend on the arguments and the config only.

        Args:
            site: the site.
            statistics: the statistics in :meth:`needs`, by layer name.
        """
        return []

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Decide on the share of each site; by default ``rank``, or the exception in ``rank_pattern``.

        Args:
            sites: the sites.
            options: the options from :meth:`options`, by the site's name.
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
        """Return for each module name of the site the node of its replacement; reads shapes, never values."""

    def deltas(self, site: Site, share: Share) -> Mapping[str, DeltaNode]:
        """Return adapters to put on the modules of :meth:`structure`; none by default.

        For a method that computes a replacement and an adapter together. The engine attaches the adapter.
        """
        return {}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any] | None:
        """Fill the modules that were built from :meth:`structure`; the site still has the original ones.

        Args:
            site: the site.
            new: the modules to fill, by name.
            statistics: the statistics in :meth:`needs`, by layer name.
            handle: the handle of the chosen option, computed from these same statistics. None if the
                statistics have changed since (sequential calibration): everything is then computed again.

        Returns:
            Facts for the report as plain data, or None.
        """


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU random generator that depends only on the seed and the module's name.

    So random starts do not depend on the order of modules, the device, or earlier random draws.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
