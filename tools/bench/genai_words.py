"""``python -m graphwright.tools.bench.genai_words --peer-python PYTHON``: the same words?

A small decoder of random weights with a tokenizer of each kind that checkpoints have
(``tokenizer_kinds``), as published and as transformers 5 saves it, is exported; onnxruntime-genai,
in an environment of its own, reads texts with its own tokenizer, puts its chat template around a
message, and writes greedily until a token ends the text. Its ids, words and tokens are held against
transformers' tokenizer of the same folder and ``generate`` of the library's own model, and against
``gw.generate``. One of the tokens that end a text is one that the model writes. With ``--dtype`` or
``--recipe`` the artifact is another than the library's model in float32, which is left out then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TEXTS = (
    "The functions of this module", "  two leading spaces", " one", "line\nbreak\n\nand\ttab",
    "Grüße, naïve café", "日本語のテキスト 你好", "😀 emoji 👩\u200d👩\u200d👧 done",
    "x<|im_end|>y", "</s> in text", "a  b   c    d", "\r\nwindows\r\n", "don't we'll I'M",
    "12345678 3.14", "\u00a0nbsp\u200bzw", "ends with space ", "[INST] hi [/INST]",
    "<start_of_turn>user\nhi<end_of_turn>\n", "e\u0301 combining", "ﬁ ligature ① Ａ",
    "hello world .", "trailing newline\n", "<|begin_of_text|>x<|eot_id|>", "",
)  # fmt: skip
MESSAGE = [{"role": "user", "content": "What does this do?"}]
NEW, WRITTEN, STOP = 24, 6, 9
"""Tokens that are written behind each of the first texts; the place of one that ends them."""
BROKEN = "\ufffd"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all and say how many are equal; 1 where tokens that were written are not."""
    parser = argparse.ArgumentParser(
        prog="genai_words", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--peer-python", required=True, help="of onnxruntime-genai's environment")
    parser.add_argument("--only", default="*", metavar="GLOB", help="of the kinds")
    parser.add_argument("--dtype", default="float32", help="of the artifact, such as float16")
    parser.add_argument("--recipe", default="", help="what is made of the model first")
    parser.add_argument("--show", action="store_true", help="what differs, text by text")
    options = parser.parse_args(arguments)
    right = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, source, folder in _folders(Path(scratch), options):
            plain = options.dtype == "float32" and not options.recipe
            counts, shown, equal = _compared(source, folder, options.peer_python, plain=plain)
            sys.stdout.write(f"{name}: {'; '.join(counts)}\n")
            if options.show:
                sys.stdout.writelines(f"    {line}\n" for line in shown)
            right &= equal
    return int(not right)


def _folders(scratch: Path, options: argparse.Namespace) -> Iterator[tuple[str, Path, Path]]:
    """Models and their artifacts, with what each is."""
    import torch
    import transformers

    from ...backends.artifacts.exporting import export
    from ...ir.load.sources import load
    from ...passes.manager import optimize
    from .tokenizer_kinds import KINDS

    def exported(source: Path, name: str) -> Path:
        graph = load(source, dtype=getattr(torch, options.dtype))
        graph = optimize(graph, options.recipe).graph if options.recipe else graph
        return export(graph, scratch / name, target="genai")

    for name in KINDS:
        if not fnmatchcase(name, options.only):
            continue
        source = scratch / name
        _model(name, source)
        yield name, source, exported(source, f"{name}-out")
        words: Any = transformers.AutoTokenizer.from_pretrained(source)
        (source / "tokenizer_config.json").unlink()
        words.save_pretrained(source)
        yield f"{name}, as transformers 5 saves it", source, exported(source, f"{name}-saved")


def _model(name: str, folder: Path) -> None:
    """A decoder whose fitting tokens end texts: one of them is the ninth behind the first text."""
    import torch
    import transformers

    from .tokenizer_kinds import KINDS, write

    folder.mkdir()
    sizes, kind = write(KINDS[name], folder), KINDS[name].model
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, pad_token_id=None,
        **sizes | {"eos_token_id": sizes["eos_token_id"][0]},
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)
    words: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = _library_tokens(model, words(TEXTS[0])["input_ids"])
    ends = [*sizes["eos_token_id"], tokens[min(STOP, len(tokens)) - 1]]
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=sizes["bos_token_id"], eos_token_id=ends, pad_token_id=words.pad_token_id
    )
    model.save_pretrained(folder)


def _library_tokens(model: Any, ids: list[int]) -> list[int]:
    import torch

    prompt = torch.tensor([ids])
    with torch.no_grad():
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False
        )
    return [int(token) for token in written[0][len(ids) :]]


def _compared(
    source: Path, folder: Path, python: str, *, plain: bool
) -> tuple[list[str], list[str], bool]:
    """Counts of what is equal, what is not, and whether all tokens that were written are."""
    import transformers

    from ...tools.run.generating import generate
    from .processes import environment, measure

    found = folder.parent / "found.json"
    measure([python, "-P", __file__, str(folder), str(found)],
            environment(None, {"PYTHONPATH": ""}))  # fmt: skip
    answers = json.loads(found.read_text())
    words: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    shown, counts = [], []
    for key, special in (("ids", False), ("ids with special tokens", True)):
        own = [words(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
        pairs = list(zip(TEXTS, own, answers[key], strict=True))
        counts.append(f"{key} {sum(a == b for _, a, b in pairs)} of {len(pairs)}")
        shown += [f"{key} of {t!r}: {b} there, {a} here" for t, a, b in pairs if a != b]
    read = [words.decode(ids, skip_special_tokens=True) for ids in answers[key]]
    pairs = list(zip(TEXTS, read, answers["words"], strict=True))
    counts.append(f"words {sum(a == b for _, a, b in pairs)} of {len(pairs)}")
    shown += [f"words of {t!r}: {b!r} there, {a!r} here" for t, a, b in pairs if a != b]
    if words.chat_template:
        chat = words.apply_chat_template(MESSAGE, tokenize=False, add_generation_prompt=True)
        counts.append("chat " + ("equal" if chat == answers["chat"] else "DIFFERENT"))
    library, text, ours, own_text = 0, 0, 0, 0
    for prompt, tokens, said in answers["written"]:
        other = _library_tokens(model, prompt)
        if other[-1] in model.generation_config.eos_token_id:
            other.pop()  # the runtime keeps what ends a text to itself
        library += tokens == other
        if plain and tokens != other:
            shown.append(f"behind {prompt}: {tokens} there, {other} by the library")
        expected = words.decode(tokens, skip_special_tokens=True)
        text += _until_broken(expected) == _until_broken(said)
        here = generate(folder, words.decode(prompt, skip_special_tokens=True),
                        max_new_tokens=NEW)[0]  # fmt: skip
        ids = [*here.ids][: -1 if here.ended == "eos" else None]
        ours += ids == tokens
        own_text += here.text == expected
    count = len(answers["written"])
    ends = sum(len(tokens) < NEW for _, tokens, _ in answers["written"])
    counts.append(f"written, {ends} ended: {text} of {count} in words")
    counts.append(f"{ours} as gw.generate of the words, {own_text} in words")
    counts += [f"{library} as the library"] if plain else []
    return counts, shown, (library if plain else ours) == count


def _until_broken(text: str) -> str:
    """What stands before bytes that are no character: the runtime's decoder ends there."""
    return text.partition(BROKEN)[0].strip()


def peer(folder: str, out: str) -> None:
    """In the other environment: what onnxruntime-genai reads and writes."""
    import numpy as np
    import onnxruntime_genai as library

    model, found = library.Model(folder), dict[str, Any]()
    words = library.Tokenizer(model)
    for key, special in (("ids", False), ("ids with special tokens", True)):
        words.update_options(add_special_tokens=special)
        found[key] = [[int(i) for i in words.encode(text)] for text in TEXTS]
    found["words"] = [words.decode(np.array(ids, np.int32)) for ids in found[key]]
    if "chat_template" in (Path(folder) / "tokenizer_config.json").read_text() or (
        Path(folder) / "chat_template.jinja"
    ).is_file():
        found["chat"] = words.apply_chat_template(json.dumps(MESSAGE), add_generation_prompt=True)
    found["written"] = []
    for ids in found[key][:WRITTEN]:
        settings = library.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids) + NEW, do_sample=False)
        running = library.Generator(model, settings)
        running.append_tokens(np.array([ids], np.int32))
        while not running.is_done():
            running.generate_next_token()
        tokens = [int(i) for i in running.get_sequence(0)][len(ids) :]
        found["written"].append([ids, tokens, words.decode(np.array(tokens, np.int32))])
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    # By its path, as the other environment runs it, it is in no package.
    sys.exit(main()) if __package__ else peer(*sys.argv[1:])
