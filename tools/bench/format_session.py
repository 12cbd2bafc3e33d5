"""The environment of other tools' libraries, in one process for all that ``formats.py`` asks of it.

An import of these libraries takes longer than what they then do. By its path, in that environment,
it runs scripts: each line of stdin is JSON, a script's path and its arguments, and each line of
stdout is JSON too, what the script failed with, or an empty text.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback


class Session:
    """The process, which begins with the first script and again after one that ended it."""

    def __init__(self, python: str) -> None:
        self.python = python
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 lives as it does

    def run(self, script: str, *arguments: object) -> str:
        """Run a script there; what it failed with, or an empty text."""
        if self._process is None:
            # -P: a module of this folder must not stand in for a library of its name.
            self._process = subprocess.Popen(
                [self.python, "-P", __file__], env={**os.environ, "PYTHONPATH": ""}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([script, *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return str(json.loads(line))
        status, self._process = self._process.wait(), None
        self._errors.seek(0)
        return f"{self._errors.read()}\nError: ended with {status}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        self._errors.close()


def serve() -> None:
    """In the other environment: run what is asked for until nothing is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries print is no place for answers
    for line in sys.stdin:
        script, *arguments = json.loads(line)
        sys.argv, failure = [script, *arguments], ""
        try:
            runpy.run_path(script, run_name="__main__")
        except Exception:
            failure = traceback.format_exc()
        answers.write(json.dumps(failure) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
