"""A vision-language model that looks at half of its image tokens, and the picture that it is asked
about.

``python -m graphwright.tools.examples.pruned_vision [OUT]`` writes the artifact and beside it
``OUT.png``, a scene of handwritten digits such as the model was trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import graphwright as gw
from graphwright.ir.load.zoo import scenes
from PIL import Image

QUESTION = "how many digits are there ?"


def draw(path: Path) -> scenes.Question:
    """Write a picture; the question about it, with its answer."""
    drawn = next(q for q in scenes.questions("test", 40) if q.text == QUESTION)
    pixels = (drawn.scene.image.transpose(1, 2, 0) * 255).round().clip(0, 255)
    Image.fromarray(pixels.astype("uint8")).save(path)
    return drawn


def main(out: Path) -> str:
    result = gw.optimize("zoo:tiny-llava", "fastervlm{keep=50%}")
    gw.export(result.graph, out, report=result.report, force=True)
    picture = out.with_name(f"{out.name}.png")
    drawn = draw(picture)
    (answer,) = gw.generate(out, QUESTION, images=picture, max_new_tokens=1)
    print(f"{picture}: {QUESTION} {answer.text} (there are {drawn.answer})")
    return answer.text


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out-vision"))
