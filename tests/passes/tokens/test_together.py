"""Each way to prune image tokens before the passes that shrink what is left, with a cache."""

from __future__ import annotations

import graphwright as gw
import pytest
import torch
from graphwright.ir.run.sweep import sweep
from graphwright.ir.structure.cache_slots import next_step

from .llava import FRAMES, IMAGE, Models, prompts, with_past

OTHERS = "quantize{bits=4 group=0 accuracy_level=0},eora{rank=4}"
METHODS = (
    "diverse{keep=8}", "similarity{keep=8 merge=true}", "tome{r=2}", "visual-exit{layer=2}",
    "fastv{layer=2 keep=8},keep-entropy", "aim",
)  # fmt: skip
"""One of each way to cut; ``bench.token_steps`` runs all methods."""
OF_VIDEOS = (
    "pool-frames{to=2x2}", "intp-video{factor=2}",
)  # fmt: skip
FEWER, OTHER = "drop-blocks{score=random count=1 seed=1}", "path{blocks=0,1.mlp,2,2-3}"
"""The second leaves out half a block and runs one twice, between which no token leaves."""
INSIDE = ("visual-exit", "fastv", "pyramid-drop", "aim")
"""Those that cut between two blocks."""
BY_LAST_WORD = ("fastv", "pyramid-drop", "aim")
"""Their score is what the prompt's last token looks at, which is another in a longer prompt."""


@pytest.mark.parametrize("method", [*METHODS, *OF_VIDEOS])
def test_bits_paths_and_other_blocks_behind_a_cut(
    models: Models, videos: Models, method: str
) -> None:
    """A step after the prompt gives what one run over both does, of a graph of all together."""
    of_videos = method in OF_VIDEOS
    graph = (videos if of_videos else models).cached["onnx"]
    # Without its empty caches, of which a block that leaves takes one away.
    prompt = prompts(3, 2, pictures=FRAMES if of_videos else 1)
    recipe = f"{method},{FEWER if method.startswith(INSIDE) else OTHER},{OTHERS}"
    result = gw.optimize(graph, recipe, samples=[prompt], calibration=[prompt])
    assert all(step.result.sites for step in result.report.passes)
    batch = with_past(result.graph, prompt)
    outputs = sweep(result.graph, batch)
    step = next_step(batch, outputs)
    assert step is not None
    words = torch.randint(1, IMAGE, (3, 1), generator=torch.Generator().manual_seed(1))
    after = sweep(result.graph, step | {"input_ids": words})["logits"]
    assert after.isfinite().all()
    if method.startswith(BY_LAST_WORD):
        return
    mask = torch.cat([batch["attention_mask"], torch.ones_like(words)], 1)
    whole = batch | {"input_ids": torch.cat([batch["input_ids"], words], 1), "attention_mask": mask}
    together = sweep(result.graph, whole)["logits"]
    torch.testing.assert_close(after[:, -1], together[:, -1], rtol=1e-4, atol=1e-4)
