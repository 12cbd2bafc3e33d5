"""Additive codes: a group of a row's weights is a sum of codebooks' vectors, times a scale.

The error that counts is that of the outputs, ``tr(D S D^T)`` with ``D = W - W^`` and the Gram
matrix S of the inputs. Three steps lower it in turn, none of which can raise it: codes by a beam
search over a group's codebooks, group after group, each by the exact change of that quadratic form;
codebooks by least squares; and row scales likewise. AQLM (Egiazarian et al. 2024, arXiv 2401.06118)
without its training: there Adam moves codebooks and scales, here both have a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.ops.linear_aqlm import WIDTH

LLOYD = 15
"""Steps of k-means for each codebook that is begun with."""
SAMPLE = 1 << 16
"""Vectors that k-means looks at, at most."""
STEPS = 12
"""Steps of conjugate gradients towards the best codebooks; each begins where the last ended."""
ENOUGH = 0.01
"""A round that lowers the error by a smaller share is the last (the paper's README)."""
DAMPING = 0.01
"""Share of the mean of S's diagonal that is added to it: with few tokens S says nothing of some
directions, and codebooks would be free there."""
CHUNK = 1 << 14
"""Vectors whose distances to all centres are held together."""
ROWS = 512
"""Rows whose codes are chosen together: what is worked on stays in a core's second-level cache."""


@dataclass
class Additive:
    """``W^ = scale * sum_m C_m[code_m]`` of a matrix [N, K], K padded to a multiple of 8."""

    codes: Tensor
    """i64 [M, N, K / 8]."""
    books: Tensor
    """f32 [M, entries, 8]."""
    scales: Tensor
    """f32 [N]."""

    def unscaled(self) -> Tensor:
        """[N, K], before rows are scaled."""
        total = self.books[0][self.codes[0]]
        for book, code in zip(self.books[1:], self.codes[1:], strict=True):
            total += book[code]
        return total.flatten(1)

    def dense(self) -> Tensor:
        """[N, K]."""
        return self.unscaled() * self.scales.unsqueeze(1)


def fitted(
    weight: Tensor, gram: Tensor, *, books: int, entries: int, beam: int, rounds: int
) -> Additive:
    """Codes, codebooks and scales of ``weight`` [N, K] on inputs of a Gram matrix [K, K].

    Codebooks are numbers of float16 when the last codes and scales are chosen. Everything is
    drawn from a fixed seed.
    """
    padding = -weight.shape[1] % WIDTH
    wide = torch.nn.functional.pad(weight.float(), (0, padding))
    metric = torch.nn.functional.pad(gram.float(), (0, padding, 0, padding))
    metric /= metric.diagonal().mean().clamp_min(1e-30)
    metric.diagonal().add_(DAMPING)
    form = started(wide, books, entries)
    error = _error(wide, form, metric)
    for _ in range(rounds):
        improve_books(form, wide, metric)
        improve_codes(form, wide, metric, beam)
        improve_scales(form, wide, metric)
        before, error = error, _error(wide, form, metric)
        if error > (1 - ENOUGH) * before:
            break
    improve_books(form, wide, metric)
    form.books = form.books.half().float()
    improve_codes(form, wide, metric, beam)
    improve_scales(form, wide, metric)
    return form


def _error(weight: Tensor, form: Additive, metric: Tensor) -> float:
    gap = weight - form.dense()
    return float(((gap @ metric) * gap).sum())


# --- where it begins ------------------------------------------------------------------------------


def started(weight: Tensor, books: int, entries: int) -> Additive:
    """Rows scaled to a root mean square of 1; k-means of their groups, then of what each codebook
    leaves of them."""
    scales = weight.square().mean(1).sqrt()
    safe = torch.where(scales > 0, scales, 1.0)
    rest = (weight / safe.unsqueeze(1)).reshape(-1, WIDTH)
    shape = (len(weight), weight.shape[1] // WIDTH)
    rng = torch.Generator().manual_seed(0)
    codes, centres = [], []
    for _ in range(books):
        book = _centres(rest, entries, rng)
        nearest = _nearest(rest, book)
        rest = rest - book[nearest]
        codes.append(nearest.view(shape))
        centres.append(book)
    return Additive(torch.stack(codes), torch.stack(centres), scales)


def _centres(vectors: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Lloyd's algorithm on a sample; a centre that loses all its vectors moves to the one that lies
    farthest from its own."""
    sample = vectors[torch.randperm(len(vectors), generator=rng)[:SAMPLE]]
    centres = sample[torch.arange(count) % len(sample)].clone()
    for _ in range(LLOYD):
        nearest = _nearest(sample, centres)
        members = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres = torch.where(members[:, None] > 0, sums / members.clamp_min(1)[:, None], centres)
        empty = (members == 0).nonzero().flatten()[: len(sample)]
        if len(empty):
            far = (sample - centres[nearest]).square().sum(1).topk(len(empty)).indices
            centres[empty] = sample[far]
    return centres


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """The number of each vector's nearest centre."""
    energy = centres.square().sum(1)
    nearest = torch.empty(len(vectors), dtype=torch.int64)
    for begin in range(0, len(vectors), CHUNK):
        part = slice(begin, begin + CHUNK)
        nearest[part] = torch.addmm(energy, vectors[part], centres.T, alpha=-2).argmin(1)
    return nearest


# --- codes ----------------------------------------------------------------------------------------


def improve_codes(form: Additive, weight: Tensor, metric: Tensor, beam: int) -> None:
    """Choose each group's codes anew, all others given."""
    for begin in range(0, len(weight), ROWS):
        part = slice(begin, begin + ROWS)
        rows = Additive(form.codes[:, part], form.books, form.scales[part])
        _improve_rows(rows, (weight[part] - rows.dense()) @ metric, metric, beam)


def _improve_rows(form: Additive, pull: Tensor, metric: Tensor, beam: int) -> None:
    """``pull`` is ``D S`` [N, K]: minus half the gradient of the error by ``W^``."""
    for group in range(form.codes.shape[2]):
        span = slice(group * WIDTH, (group + 1) * WIDTH)
        codes, moved = _chosen(form, pull[:, span], metric[span, span], group, beam)
        form.codes[:, :, group] = codes
        pull.addmm_(moved, metric[span], alpha=-1)


def _chosen(
    form: Additive, pull: Tensor, metric: Tensor, group: int, beam: int
) -> tuple[Tensor, Tensor]:
    """The codes [M, N] of one group, and by how much they move its weights [N, 8].

    Codebook after codebook, each of up to ``beam`` choices of codes is tried with every vector in
    the place of its own; the best ``beam`` of all go on. The codes that are there are the first
    choice, so that the error cannot grow. Choices never meet: codebooks behind the current one have
    the codes that they had.
    """
    rows, scale = torch.arange(len(pull)), form.scales[:, None, None]
    choices = form.codes[:, :, group].T.unsqueeze(1).clone()  # [N, 1, M]
    moved = pull.new_zeros((len(pull), 1, WIDTH))
    cost = pull.new_zeros((len(pull), 1))
    for place, book in enumerate(form.books):
        energy = ((book @ metric) * book).sum(1)
        bare = moved - scale * book[choices[:, :, place]]
        towards = pull.unsqueeze(1) - bare @ metric
        # What a choice costs without this codebook: -2 p.m + m S m, with m how far weights moved.
        cost = -((towards + pull.unsqueeze(1)) * bare).sum(-1)
        trial = torch.addcmul(cost.unsqueeze(-1), scale.square(), energy)
        trial = trial.sub_((2 * scale * towards) @ book.T).flatten(1)
        cost, best = trial.topk(min(beam, trial.shape[1]), largest=False)
        parent, entry = best // len(book), best % len(book)
        choices = choices[rows[:, None], parent]
        choices[:, :, place] = entry
        moved = bare[rows[:, None], parent] + scale * book[entry]
    return choices[:, 0].T, moved[:, 0]


# --- codebooks and scales -------------------------------------------------------------------------


def improve_books(form: Additive, weight: Tensor, metric: Tensor) -> None:
    """Some steps of conjugate gradients on the normal equations, from the codebooks that are
    there. A vector that no code names stays."""

    def gathered(pull: Tensor) -> Tensor:
        """The gradient by the codebooks, from that by the weights."""
        vectors = (pull * form.scales.unsqueeze(1)).reshape(-1, WIDTH)
        sums = torch.zeros_like(form.books)
        for total, code in zip(sums, form.codes, strict=True):
            total.index_add_(0, code.flatten(), vectors)
        return sums

    rest = gathered((weight - form.dense()) @ metric)
    direction, size = rest.clone(), float(rest.square().sum())
    for _ in range(STEPS):
        if size <= 0:
            return
        spread = Additive(form.codes, direction, form.scales).dense()
        curved = gathered(spread @ metric)
        curvature = float((direction * curved).sum())
        if curvature <= 0:
            return
        step = size / curvature
        form.books = form.books + step * direction
        rest = rest - step * curved
        before, size = size, float(rest.square().sum())
        direction = rest + size / before * direction


def improve_scales(form: Additive, weight: Tensor, metric: Tensor) -> None:
    """The best scale of each row, codes and codebooks given; a row that they cannot say keeps
    its own."""
    plain = form.unscaled()
    pulled = plain @ metric
    energy = (pulled * plain).sum(1)
    best = (pulled * weight).sum(1) / energy.clamp_min(1e-30)
    form.scales = torch.where(energy > 0, best, form.scales)
