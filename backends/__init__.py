"""From a graph to something that runs: ``compile`` an executable, ``export`` an artifact."""

from .artifacts.exporting import export
from .base import Backend, Executable
from .registry import backend_names, compile, find_backend

__all__ = ["Backend", "Executable", "backend_names", "compile", "export", "find_backend"]
