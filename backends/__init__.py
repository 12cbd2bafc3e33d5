"""From a graph to something that runs: ``compile`` an executable, ``export`` an artifact."""

from .artifact import export
from .base import Executable, backend_names, compile  # noqa: A004

__all__ = ["Executable", "backend_names", "compile", "export"]
