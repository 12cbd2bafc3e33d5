"""``python -m graphwright.tools.bench.harness [MODEL] --python ENV/bin/python``: lm-eval on ours.

lm-evaluation-harness (``lm-eval``, PyPI), in an environment that has it beside what the package
needs, asks three models: its own for transformers (``hf``) on MODEL's folder, our artifact of it,
and our artifact in 8 bits. The tasks are texts to score whole (``loglikelihood_rolling``), endings
to choose from (``loglikelihood``) and texts to go on with (``generate_until``); their data are
shipped text, written as files here, so that nothing is fetched. With ``--add`` folders of packages
that ``ENV`` lacks are read behind its own. Ends with 1 where an answer of our artifact is not the
harness's own model's: a text, a choice, or a log-likelihood by more than 1e-4 of it.
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
from ...ir.core.errors import BadInput
from ...ir.load.zoo.text import shipped_text
from ..run.named_model import optimize
from .processes import TAIL, CommandFailed, environment

RECIPES = {"ours": "clean", "ours in 8 bits": "quantize{bits=8 group=64}"}
TASKS = ("local_text", "local_choice", "local_writing")
SAMPLES = 40
"""Of a task."""
BOUND = 1e-4
"""Of a log-likelihood: what another order of sums makes of hundreds of tokens."""
ASK = """
import json, sys
sys.path += sys.argv[5:]
import lm_eval
from lm_eval.tasks import TaskManager
kind, place, tasks, named = sys.argv[1:5]
names = named.split(",")
if kind == "hf":
    from lm_eval.models.huggingface import HFLM
    model = HFLM(pretrained=place, dtype="float32", device="cpu", batch_size=1)
else:
    from graphwright.tools.evaluate.harness import language_model
    model = language_model(place)
answered = lm_eval.simple_evaluate(
    model, tasks=names, bootstrap_iters=0, log_samples=True,
    task_manager=TaskManager(include_path=tasks, include_defaults=False))
figures = {name: {key.partition(",")[0]: value for key, value in answered["results"][name].items()
                  if isinstance(value, float)} for name in names}
answers = {name: [row["resps"] for row in sorted(answered["samples"][name],
                                                 key=lambda row: row["doc_id"])] for name in names}
print(json.dumps({"version": lm_eval.__version__, "figures": figures, "answers": answers}))
"""


def write_tasks(folder: Path) -> None:
    """Three tasks of the harness, with their data beside them: of shipped texts the whole, which
    of two next sentences is theirs, and what comes behind their first words."""
    texts = [text for text in shipped_text("test") if len(text) > 600]
    texts = texts[:: max(1, len(texts) // SAMPLES)][:SAMPLES]
    rows = [{"text": text, "head": text[:200], "tail": text[200:260]} for text in texts]
    choices = [
        {"head": row["head"], "ends": [row["tail"], other["tail"]][:: 1 - 2 * (number % 2)],
         "right": number % 2}
        for number, (row, other) in enumerate(zip(rows, rows[1:] + rows[:1], strict=True))
    ]  # fmt: skip
    _task(folder, "local_text", rows, output_type="loglikelihood_rolling", doc_to_text="",
          doc_to_target="{{text}}",
          metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}])  # fmt: skip
    _task(folder, "local_choice", choices, output_type="multiple_choice", doc_to_text="{{head}}",
          doc_to_choice="ends", doc_to_target="right", target_delimiter="",
          metric_list=[{"metric": "acc"}])  # fmt: skip
    _task(folder, "local_writing", rows, output_type="generate_until", doc_to_text="{{head}}",
          doc_to_target="{{tail}}", generation_kwargs={"until": ["."], "max_gen_toks": 16},
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


def asked(kind: str, place: Path, tasks: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the harness says of a model: ``version``, ``figures`` and ``answers`` by task.

    Raises ``CommandFailed`` with the end of what it said instead.
    """
    command = [options.python, "-c", ASK, kind, str(place), str(tasks), ",".join(TASKS),
               *options.add]  # fmt: skip
    done = subprocess.run(
        command, env=environment(None, {}), check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise CommandFailed(done.stderr[-TAIL:])
    answered: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answered


def furthest(answers: Any, theirs: Any) -> tuple[int, float]:
    """(answers that are not equal, the greatest distance of a number, relative): of a pair of
    nested lists of numbers, truths and texts."""
    if isinstance(theirs, list | tuple):
        parts = [furthest(a, b) for a, b in zip(answers, theirs, strict=True)]
        return sum(count for count, _ in parts), max((far for _, far in parts), default=0.0)
    if isinstance(theirs, float):
        return 0, abs(answers - theirs) / max(1.0, abs(theirs))
    return int(answers != theirs), 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what each model scores; 1 where our artifact's answers are not the harness's own."""
    parser = argparse.ArgumentParser(
        prog="harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="zoo:tiny-llama")
    parser.add_argument("--python", required=True, help="of an environment with lm-eval")
    parser.add_argument("--add", action="append", default=[], help="a folder of packages")
    options = parser.parse_args(arguments)
    graph = load(options.model)
    if graph.source.folder is None:
        raise BadInput(f"{options.model} has no folder, which the harness's own model reads")
    with tempfile.TemporaryDirectory() as scratch:
        tasks = Path(scratch) / "tasks"
        tasks.mkdir()
        write_tasks(tasks)
        theirs = asked("hf", Path(graph.source.folder), tasks, options)
        print(f"lm-eval {theirs['version']}, {SAMPLES} samples a task\n\nhf: {theirs['figures']}")
        equal = True
        for name, recipe in RECIPES.items():
            result = optimize(graph, recipe)
            out = export(result.graph, Path(scratch) / name, report=result.report)
            ours = asked("ours", out, tasks, options)
            gaps = {task: furthest(ours["answers"][task], theirs["answers"][task])
                    for task in TASKS}  # fmt: skip
            print(f"{name}: {ours['figures']}")
            for task, (unequal, far) in gaps.items():
                print(f"  {task}: {unequal} answers differ, log-likelihoods by {far:.1e} at most")
            if name == "ours":
                equal = all(not unequal and far <= BOUND for unequal, far in gaps.values())
    return int(not equal)


if __name__ == "__main__":
    raise SystemExit(main())
