"""Which patches each score keeps, worked out from what the library's modules compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from graphwright.passes.tokens.quota import LEAST, STEP, spread
from torch import Tensor

from .llava import best, cls_scores, projected


def cosines(x: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=3)


def diverse(model: Any, pixels: Tensor, count: int) -> Tensor:
    """One after another, each as far from all before as can be."""
    distances = 1 - cosines(projected(model, pixels))
    patches = distances.shape[1]
    chosen = torch.zeros(len(pixels), patches, dtype=torch.bool)
    for row, distance in zip(chosen, distances, strict=True):
        others = distance + 9 * torch.eye(patches)
        row[others.amin(1).argmax()] = True
        while row.sum() < count:
            least = distance[row].amin(0)
            row[least.masked_fill(row, -1).argmax()] = True
    return chosen


def unlike(model: Any, pixels: Tensor, count: int) -> Tensor:
    alike = cosines(projected(model, pixels))
    patches = alike.shape[1]
    nearest = (alike - 9 * torch.eye(patches)).amax(2)
    return best(1 - nearest - 3e-7 * torch.arange(patches), count)


def received(model: Any, pixels: Tensor) -> Tensor:
    attention = model.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    scores: Tensor = attention.mean(1).sum(1)[:, 1:]
    return scores


def focal(model: Any, pixels: Tensor, count: int) -> Tensor:
    return best(received(model, pixels), count)


def focal_rows(model: Any, pixels: Tensor, count: int, columns: int = 4) -> Tensor:
    rows = received(model, pixels).unflatten(1, (-1, columns)).sum(2)
    return best(rows, count // columns).repeat_interleave(columns, 1)


def looked_at(model: Any, pixels: Tensor, count: int) -> Tensor:
    return best(cls_scores(model, pixels), count)


def half_by_difference(model: Any, pixels: Tensor, count: int) -> Tensor:
    """VisPruner's, one picture at a time."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    scores = cls_scores(model, pixels)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row, score, x in zip(chosen, scores, hidden[:, 1:], strict=True):
        order, alike = score.argsort(descending=True).tolist(), cosines(x[None])[0]
        important, others = order[: count // 2], order[count // 2 :]
        while len(others) > count - count // 2:
            evens, odds = others[::2], others[1::2]
            evens.sort(key=lambda i: -float(alike[i, odds].max()))
            others = evens[min(8, len(others) - count + count // 2) :] + odds
        row[important + others] = True
    return chosen


KEPT: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "diverse": diverse, "similarity": unlike, "fopru": focal, "fopru{strategy=row}": focal_rows,
    "vispruner": half_by_difference,
}  # fmt: skip


def with_keep(name: str, count: int) -> str:
    return f"{name[:-1]} keep={count}}}" if name.endswith("}") else f"{name}{{keep={count}}}"


def merged(x: Tensor, chosen: Tensor) -> Tensor:
    """Of features ``[pictures, patches, width]`` those chosen, each the mean of the patches that
    are most like it, at their places."""
    rows = []
    for v, alike, row in zip(x, cosines(x), chosen, strict=True):
        staying = row.nonzero().squeeze(1)
        home = staying[alike[:, staying].argmax(1)]
        groups = [home == place for place in range(len(v))]
        rows.append(torch.stack([v[g].mean(0) if g.any() else v[0] for g in groups]))
    return torch.stack(rows)


def paired(x: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Even rows go into the odd ones most like them until ``count`` are left, in raster order."""
    rows = [([i], v) for i, v in enumerate(x)]
    while len(rows) > count:
        vectors = torch.stack([v for _, v in rows])
        alike = cosines(vectors[None])[0]
        odd = range(1, len(rows), 2)
        pairs = [(max(odd, key=lambda j: float(alike[i, j])), i) for i in range(0, len(rows), 2)]
        pairs.sort(key=lambda pair: -float(alike[pair[1], pair[0]]))
        gone = {i: j for j, i in pairs[: min(len(rows) // 2, len(rows) - count)]}
        order = [i for i in range(0, len(rows), 2) if i not in gone] + list(odd)
        groups = [[i, *(s for s, j in gone.items() if j == i)] for i in order]
        rows = [([rows[g[0]][0][0]], torch.stack([rows[i][1] for i in g]).mean(0)) for g in groups]
    rows.sort(key=lambda row: row[0])
    return torch.stack([v for _, v in rows]), [i for (i,), _ in rows]


# --- a budget for each crop -----------------------------------------------------------------------


def cls_logits(model: Any, pixels: Tensor) -> Tensor:
    """What the CLS query gives for each patch before the softmax, ``[pictures, patches]``."""
    vision = model.model.vision_tower
    layer = vision.encoder.layers[-2]
    site = layer.self_attn
    normed = layer.layer_norm1(vision(pixels, output_hidden_states=True).hidden_states[-3])
    q, k = (p(normed).unflatten(2, (site.num_heads, -1)).transpose(1, 2)
            for p in (site.q_proj, site.k_proj))  # fmt: skip
    logits: Tensor = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).mean(1)[:, 0, 1:]
    return logits


def shared_out(
    scores: Tensor, ratio: float, grid: tuple[int, int], temperature: float
) -> tuple[Tensor, Tensor]:
    """Which of the scores of a thumbnail and a ``grid`` of crops ``[1 + crops, patches]`` stay,
    bool and as they are, and each crop's share."""
    (rows, columns), patches = grid, scores.shape[1]
    side = round(patches**0.5)
    thumbnail, crops = scores[0].reshape(side, side), scores[1:]
    down, across = ([*(i * (side // n) for i in range(n)), side] for n in grid)
    regions = [
        thumbnail[down[i] : down[i + 1], across[j] : across[j + 1]]
        for i in range(rows) for j in range(columns)
    ]  # fmt: skip
    weight = torch.softmax(torch.stack([r.sum() for r in regions]) / temperature, 0)
    share = (ratio * (1 + weight - 1 / len(crops))).clamp(max=1)
    large = torch.nn.functional.interpolate(
        thumbnail[None, None], size=(rows * side, columns * side), mode="bilinear",
        align_corners=False,
    )[0, 0]  # fmt: skip
    parts = [part.flatten() for line in large.split(side, 0) for part in line.split(side, 1)]
    keys = []
    for j, (own, part) in enumerate(zip(crops, parts, strict=True)):
        both = own / own.norm() + part / part.norm()
        for rank, place in enumerate(both.argsort(descending=True).tolist()):
            keys.append(((rank + 0.5) / (float(share[j]) * patches), (j + 1) * patches + place))
    each = round(ratio * patches)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores[0].topk(each).indices] = True
    chosen[[place for _, place in sorted(keys)[: len(crops) * each]]] = True
    return chosen.reshape(scores.shape), share


def dealt(relevance: Tensor, count: int, *, power: float = 2, side: int = 4) -> Tensor:
    """Which tokens of frames with ``side`` x ``side`` patches stay, bool ``[rows, tokens]``: one
    after the other to the frame whose weight by its tokens and a half is largest, as long as it has
    more; of equal frames to the first."""
    frames, patches = relevance.shape[1], side**2
    chosen = torch.zeros(len(relevance), frames, patches, dtype=torch.bool)
    order = spread(side, side).argsort()
    later = STEP / frames * torch.arange(frames)
    for row, said in enumerate(relevance.double()):
        weights = ((said / said.max()) ** power).clamp(min=LEAST)
        counts = torch.zeros(frames)
        for _ in range(count):
            share = weights / (counts + 0.5 + later)
            share[counts == patches] = 0
            counts[int(share.argmax())] += 1
        for frame, number in enumerate(counts.int().tolist()):
            chosen[row, frame, order[:number]] = True
    return chosen.flatten(1)
