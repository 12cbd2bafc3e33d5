"""Nothing that a file holds steers the terminal or the page: it is shown as text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.tools.cli import artifacts, main, terminal
from graphwright.tools.report.visible import visible
from onnx import TensorProto, helper, numpy_helper

EVIL = "\x1b]0;pwned\x07\x1b[31mred\r\x9b2J\u202e"
SHOWN = r"\x1b]0;pwned\x07\x1b[31mred\r\x9b2J\u202e"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose names are hostile."""
    monkeypatch.chdir(tmp_path)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", size])
        for name, size in ((f"x{EVIL}", 64), ("y", 32))
    )
    weight = numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    node = helper.make_node("MatMul", [f"x{EVIL}", "w"], ["y"], name=f"{EVIL}mm")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, "m.onnx")
    return tmp_path / "m.onnx"


def test_visible_leaves_text_and_is_done_once() -> None:
    assert visible(EVIL) == SHOWN == visible(SHOWN)
    assert visible("a\tb\n\u00fc\u2192\U0001f600 \ud800") == "a\tb\n\u00fc\u2192\U0001f600 \\ud800"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-p", "quantize{bits=8 group=32}", "-o", "out"), 0),
        (("-p", "quantize{bits=8 group=32}", "--dry-run"), 0),
        (("-p", "quantize{bits=8 include=[nowhere]}", "-v"), 2),
        ((), 0),
        (("--text",), 0),
    ],
)
def test_names_of_a_file_are_shown(
    model: Path, arguments: tuple[str, ...], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = "run" if "-p" in arguments else "inspect"
    with pytest.raises(SystemExit) as leave:
        main.main([run, "m.onnx", *arguments])
    out, err = capsys.readouterr()
    assert leave.value.code == code
    assert ";pwned" in "".join((out + err).split())
    assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & {*out, *err}
    if "out" in arguments:
        page = Path("out", "report.html").read_text()
        assert SHOWN in page and not {"\x1b", "\x07", "\x9b", "\u202e"} & {*page}


def test_a_terminal_gets_our_own_colours_and_moves_alone() -> None:
    file = io.StringIO()
    console = terminal.VisibleConsole(file=file, force_terminal=True, width=100)
    with terminal.Steps(console, after=0) as steps:
        steps(EVIL, 1, 2)
        steps._show()
    terminal.print_error(console, EVIL, EVIL)
    table = terminal.bench_table(EVIL, [EVIL], {EVIL: [1.0]}, EVIL)
    console.print(table)
    text = file.getvalue()
    assert text.count(SHOWN[:12]) >= 5 and "\x1b[1;31merror: " in text and "\x1b[?25l" in text
    assert "\x1b]" not in text and "\x07" not in text and "\u202e" not in text
    assert "\x1b[31mred" not in text


def test_what_a_tokenizer_makes_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    artifacts._write_out(0, f"{EVIL}\nnext")
    assert capsys.readouterr().out == f"{SHOWN}\nnext"
