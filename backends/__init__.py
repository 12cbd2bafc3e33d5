"""From a graph to something that runs: ``compile`` an executable, ``export`` an artifact."""

from .artifact import export
from .base import Executable, backend_names, compile

__all__ = ["Executable", "backend_names", "compile", "export"]
