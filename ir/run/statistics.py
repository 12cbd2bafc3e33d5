"""What passes learn of activations: a small class for each statistic, registered by its name.

A statistic sees the tokens of one value (the input of a linear, ``[..., K]``; leading dimensions
are tokens) or of two (the residual stream before and behind blocks), batch by batch. Masked tokens
are left out: their activations mean nothing. To add one, derive from ``Statistic`` and decorate the
class with ``register``; a pass then asks for ``Stat("its-name", at=...)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..core.errors import BadInput, near_misses
from .masks import Masks, last_tokens, tokens_that_count

At = Literal["linear", "block"]
APART = 8
"""One of so many tokens of a batch is not fitted to where a fit is judged."""
DOUBLE_UP_TO = 4096
"""Input features up to which a Gram matrix is summed in float64; above it, 8 bytes an entry would
take more than 128 MiB a site and float32 is used."""


class Statistic(ABC):
    """One statistic at one site. Tensors and numbers are all that its attributes hold."""

    name: ClassVar[str]
    at: ClassVar[At]
    """``linear``: it sees the input of a linear; ``block``: the stream before and behind blocks."""
    count: int = 0
    """Tokens seen."""

    def take(self, x: Tensor, masks: Masks) -> Tensor:
        """What is kept of a value in one batch until all values of a place are there: the tokens
        that count, ``[tokens, K]``."""
        return tokens_that_count(x, masks)

    @abstractmethod
    def add(self, *parts: Tensor) -> None:
        """Take in some batches: what ``take`` kept of each value, one behind the other."""

    def see(self, *parts: Tensor) -> None:
        """``add`` and count. Raises ``BadInput`` where a token that counts is NaN or infinite."""
        if not all(torch.isfinite(part).all() for part in parts):
            raise BadInput(
                "activations are NaN or infinite on the calibration data: nothing can be learned "
                "from them. Check the data, and the passes before"
            )
        self.count += len(parts[0])
        self.add(*parts)


S = TypeVar("S", bound=Statistic)
STATISTICS: dict[str, type[Statistic]] = {}


def register(kind: type[S]) -> type[S]:
    """Make a statistic known by its name."""
    STATISTICS[kind.name] = kind
    return kind


@dataclass(frozen=True)
class Stat:
    """A statistic that a pass asks for.

    ``span`` is how many blocks lie between the two states that a statistic of blocks compares;
    ``options`` are what the statistic's class takes, as (name, value) pairs. Raises ``BadInput``
    for a name that is not registered, or one that is taken elsewhere than ``at``.
    """

    name: str
    at: At
    span: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in STATISTICS:
            raise BadInput(
                f"there is no statistic {self.name!r}; {near_misses(self.name, STATISTICS)}"
            )
        if self.kind.at != self.at:
            raise BadInput(f"{self.name} is taken at a {self.kind.at}, not at a {self.at}")

    @property
    def kind(self) -> type[Statistic]:
        return STATISTICS[self.name]

    def make(self) -> Statistic:
        return self.kind(**dict(self.options))


class Statistics:
    """The statistics of one site, by their classes: ``statistics[Gram].matrix``."""

    def __init__(self, statistics: Iterable[Statistic] = ()) -> None:
        self._by_kind = {type(statistic): statistic for statistic in statistics}

    def __getitem__(self, kind: type[S]) -> S:
        statistic = self._by_kind[kind]
        assert isinstance(statistic, kind)
        return statistic

    def values(self) -> Iterable[Statistic]:
        return self._by_kind.values()


# --- of a linear's input ---------------------------------------------------------------------


@register
class Gram(Statistic):
    """``X^T X``.

    Products of up to ``sweep.JOINED`` tokens are summed in float32, and these in float64. That is
    exact enough for a low-rank path: an entry is off by a few of float32's epsilons of the largest
    eigenvalue, and a path is made of the directions in which most of the output's error lies. A
    test compares what a path leaves with that of one fitted in float64.
    """

    name = "gram"
    at = "linear"

    def __init__(self) -> None:
        self.matrix = torch.empty(0)
        """``[K, K]``, f64 up to ``DOUBLE_UP_TO`` features, else f32."""

    def add(self, *parts: Tensor) -> None:
        (x,) = parts
        x = x if x.dtype == torch.float64 else x.float()
        product = x.T @ x
        # No entry is larger than the largest of the diagonal.
        if not torch.isfinite(product.diagonal()).all():
            raise BadInput(
                f"activations of up to {float(x.abs().max()):.3g} on the calibration data: their "
                "squares are beyond float32, and nothing can be learned from them. Check the data, "
                "and the passes before"
            )
        if not self.matrix.numel():
            wide = x.shape[-1] <= DOUBLE_UP_TO
            self.matrix = product.double() if wide else product.float()
        else:
            self.matrix += product


@register
class Mean(Statistic):
    """The mean of each feature."""

    name = "mean"
    at = "linear"

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        """Sum of x, ``[K]`` f64."""

    def add(self, *parts: Tensor) -> None:
        self.total = self.total + parts[0].sum(0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """``[K]`` f64."""
        return torch.as_tensor(self.total) / max(1, self.count)


@register
class Square(Statistic):
    """The sum of squares of each feature: the diagonal of the Gram matrix."""

    name = "square"
    at = "linear"

    def __init__(self) -> None:
        self.total = torch.zeros(0, dtype=torch.float64)
        """Sum of x^2, ``[K]`` f64."""

    def add(self, *parts: Tensor) -> None:
        more = parts[0].double().square().sum(0)
        self.total = self.total + more if self.total.numel() else more


@register
class AbsMax(Statistic):
    """The largest magnitude of each feature."""

    name = "absmax"
    at = "linear"

    def __init__(self) -> None:
        self.most = torch.zeros(0)
        """``[K]`` f32."""

    def add(self, *parts: Tensor) -> None:
        if len(parts[0]):
            most = parts[0].abs().amax(0).float()
            self.most = torch.maximum(self.most, most) if self.most.numel() else most


@register
class Range(Statistic):
    """The least and the greatest number of all features."""

    name = "range"
    at = "linear"

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        """0 lies between them."""

    def add(self, *parts: Tensor) -> None:
        if parts[0].numel():
            low, high = parts[0].aminmax()
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))


@register
class AbsMean(Statistic):
    """The mean magnitude of each feature."""

    name = "absmean"
    at = "linear"

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        """Sum of ``|x|``, ``[K]`` f64."""

    def add(self, *parts: Tensor) -> None:
        self.total = self.total + parts[0].abs().sum(0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """``[K]`` f64."""
        return torch.as_tensor(self.total) / max(1, self.count)


@register
class Tokens(Statistic):
    """A sample of the tokens, each as likely as any other, in the order in which they came."""

    name = "tokens"
    at = "linear"

    def __init__(self, most: int = 256, seed: int = 0) -> None:
        self.most, self.seed = most, seed
        self.rows = torch.empty(0)
        """``[at most ``most``, K]`` in the dtype of the input."""
        self.keys = torch.empty(0)
        """A number drawn for each token: the lowest ones stay."""

    def add(self, *parts: Tensor) -> None:
        (x,) = parts
        generator = torch.Generator().manual_seed(self.seed + self.count)
        keys = torch.rand(len(x), generator=generator)
        if self.rows.numel():
            x, keys = torch.cat([self.rows, x]), torch.cat([self.keys, keys])
        stay = keys.topk(min(self.most, len(keys)), largest=False).indices.sort().values
        self.rows, self.keys = x[stay].clone(), keys[stay]


# --- of the residual stream ------------------------------------------------------------------


@register
class BlockInfluence(Statistic):
    """``BI = 1 - mean over tokens of cos(h_before, h_behind)``.

    ShortGPT (Men et al. 2024, arXiv 2403.03853).
    """

    name = "block_influence"
    at = "block"

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, *parts: Tensor) -> None:
        before, behind = (part.double() for part in parts)
        self.total += float(torch.nn.functional.cosine_similarity(before, behind, dim=-1).sum())

    @property
    def influence(self) -> float:
        return 1 - self.total / max(1, self.count)


@register
class AngularDistance(Statistic):
    """``arccos(cos(h_before, h_behind)) / pi`` on the last token, the mean over samples.

    Gromov et al. 2024, arXiv 2403.17887.
    """

    name = "angular_distance"
    at = "block"

    def __init__(self) -> None:
        self.total = 0.0

    def take(self, x: Tensor, masks: Masks) -> Tensor:
        return last_tokens(x, masks)

    def add(self, *parts: Tensor) -> None:
        before, behind = (part.double() for part in parts)
        cosine = torch.nn.functional.cosine_similarity(before, behind, dim=-1).clamp(-1, 1)
        self.total += float(cosine.arccos().sum())

    @property
    def distance(self) -> float:
        return self.total / max(1, self.count) / math.pi


@register
class StreamFit(Statistic):
    """Sums from which a map of the stream ``x`` to what was added to it, ``d = behind - before``,
    follows by least squares: of most tokens, and apart from them of the last eighth of each batch,
    which such a map can be judged by. ``K`` is the stream's width."""

    name = "stream_fit"
    at = "block"

    def __init__(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.float64)
        """``[2]``: most tokens, and those apart; so are all others."""
        self.x = torch.zeros(2, 0, dtype=torch.float64)
        """``[2, K]``, sum of x."""
        self.d = torch.zeros(2, 0, dtype=torch.float64)
        """``[2, K]``, sum of d."""
        self.xx = torch.zeros(2, 0, dtype=torch.float64)
        """``[2, K, K]``, sum of x x^T."""
        self.xd = torch.zeros(2, 0, dtype=torch.float64)
        """``[2, K, K]``, sum of x d^T."""
        self.dd = torch.zeros(2, dtype=torch.float64)
        """``[2]``, sum of ``|d|^2``."""

    def take(self, x: Tensor, masks: Masks) -> Tensor:
        """With a column more, which is 1 at the tokens that are apart: whole texts, as far as a
        batch is of 8 alike."""
        tokens = tokens_that_count(x, masks)
        marks = tokens.new_zeros(len(tokens), 1)
        marks[len(tokens) - len(tokens) // APART :] = 1
        return torch.cat([tokens, marks], 1)

    def add(self, *parts: Tensor) -> None:
        apart = parts[0][:, -1] > 0
        before, behind = (part[:, :-1] for part in parts)
        if not self.x.numel():
            width = before.shape[1]
            self.x, self.d = (s.new_zeros(2, width) for s in (self.x, self.d))
            self.xx, self.xd = (s.new_zeros(2, width, width) for s in (self.xx, self.xd))
        for i, rows in enumerate((~apart, apart)):
            x = before[rows].double()
            d = behind[rows].double() - x
            self.counts[i] += len(x)
            self.x[i] += x.sum(0)
            self.d[i] += d.sum(0)
            self.xx[i] += x.T @ x
            self.xd[i] += x.T @ d
            self.dd[i] += d.square().sum()


# --- of outliers in a linear's input ---------------------------------------------------------


@register
class Moments(Statistic):
    """How heavy the tails of a linear's input are.

    ``kurtosis`` is the mean over tokens of ``E[(x - mean)^4] / Var^2 - 3`` over the features: 0 for
    Gaussian ones. (Outlier-Safe Pre-training, Park et al. 2025, arXiv 2506.19697, cuts it off at 0
    and does not centre it, which gives 7 for a mean shift of one deviation.) A massive activation
    is above 100 and above 1000 times the median of its token (Sun et al. 2024, arXiv 2402.17762).
    """

    name = "moments"
    at = "linear"

    def __init__(self) -> None:
        self.excess = 0.0
        self.massive = 0
        self.squares = torch.zeros(0, dtype=torch.float64)
        """Sum of x^2, ``[K]`` f64."""
        self.most = 0.0
        """The largest magnitude."""

    def add(self, *parts: Tensor) -> None:
        x = parts[0].double()
        if not len(x):
            return
        centred = x - x.mean(1, keepdim=True)
        variance = centred.square().mean(1)
        fourth = centred.pow(4).mean(1)
        self.excess += float((fourth / variance.square().clamp_min(1e-300) - 3).sum())
        size = x.abs()
        median = size.median(1, keepdim=True).values
        self.massive += int(((size > 100) & (size > 1000 * median)).sum())
        self.most = max(self.most, float(size.max()))
        more = x.square().sum(0)
        self.squares = self.squares + more if self.squares.numel() else more

    @property
    def kurtosis(self) -> float:
        return self.excess / max(1, self.count)

    @property
    def peak(self) -> float:
        """The largest magnitude over the root mean square."""
        mean = float(self.squares.sum()) / max(1, self.count * len(self.squares))
        return self.most / math.sqrt(max(mean, 1e-300))

    @property
    def top_share(self) -> float:
        """The share of all energy that the largest feature has."""
        return float(self.squares.max()) / max(float(self.squares.sum()), 1e-300)

    def outliers(self, times: float = 6.0) -> int:
        """Features whose root mean square is so many times the median feature's."""
        size = self.squares.sqrt()
        return int((size > times * size.median()).sum())
