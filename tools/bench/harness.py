"""``python -m graphwright.tools.bench.harness [MODEL] --python ENV/bin/python``: lm-eval on ours.

The artifact of ``zoo:tiny-llama`` in 8 bits is asked by lm-evaluation-harness (``lm-eval``, PyPI)
in an environment that has it, beside what the package needs: texts to score whole
(``loglikelihood_rolling``), endings to choose from (``loglikelihood``) and texts to go on with
(``generate_until``). The tasks' data are files that are written here; nothing is fetched. With
``--add`` folders of packages that ``ENV`` lacks are read behind its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...backends.artifacts.exporting import export
from ...backends.runtimes.original import load
from ..run.named_model import optimize
from .processes import environment

RECIPE = "quantize{bits=8 group=64}"
TEXTS = (
    "The cat sat on the mat and looked at the door.",
    "It rained all day, so they stayed at home and read.",
    "One day a little girl found a key in the garden.",
)
CHOICES = (
    ("The cat sat on the", [" mat.", " of of of."], 0),
    ("They went home and", [" the the the the.", " had dinner."], 1),
    ("It was a sunny", [" day.", " and and."], 0),
)
ASK = """
import sys
sys.path += sys.argv[3:]
import lm_eval
from lm_eval.tasks import TaskManager
from graphwright.tools.evaluate.harness import language_model
names = ["local_text", "local_choice", "local_writing"]
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = lm_eval.simple_evaluate(language_model(sys.argv[1]), tasks=names, task_manager=tasks,
                                bootstrap_iters=0)
print("lm_eval", lm_eval.__version__)
for name in names:
    told = {k: float(v) for k, v in found["results"][name].items() if isinstance(v, float)}
    print(name, "samples", found["n-samples"][name]["effective"], told)
    if name == "local_writing":
        print([sample["filtered_resps"] for sample in found["samples"][name]])
"""


def write_tasks(folder: Path) -> None:
    """Three tasks of the harness, with their data beside them."""
    rows = [{"text": text, "head": text[:20], "tail": text[20:]} for text in TEXTS]
    choices = [{"head": head, "ends": ends, "right": right} for head, ends, right in CHOICES]
    _task(folder, "local_text", rows, output_type="loglikelihood_rolling", doc_to_text="",
          doc_to_target="{{text}}",
          metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}])  # fmt: skip
    _task(folder, "local_choice", choices, output_type="multiple_choice", doc_to_text="{{head}}",
          doc_to_choice="ends", doc_to_target="right", target_delimiter="",
          metric_list=[{"metric": "acc"}])  # fmt: skip
    _task(folder, "local_writing", rows, output_type="generate_until", doc_to_text="{{head}}",
          doc_to_target="{{tail}}", generation_kwargs={"until": ["."], "max_gen_toks": 8},
          metric_list=[{"metric": "exact_match"}])  # fmt: skip


def _task(folder: Path, name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name, "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, **settings,
    }  # fmt: skip
    # JSON is YAML, which the harness reads.
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="zoo:tiny-llama")
    parser.add_argument("--python", required=True, help="of an environment with lm-eval")
    parser.add_argument("--add", action="append", default=[], help="a folder of packages")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        result = optimize(load(options.model), RECIPE)
        artifact = export(result.graph, place / "made", report=result.report)
        (place / "tasks").mkdir()
        write_tasks(place / "tasks")
        asked = [options.python, "-c", ASK, str(artifact), str(place / "tasks"), *options.add]
        return subprocess.run(asked, env=environment(None, {}), check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
