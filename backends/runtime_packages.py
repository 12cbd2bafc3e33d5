"""Which ONNX Runtime there is: its builds are packages of their own that share one folder."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

BUILDS = ("onnxruntime", "onnxruntime-gpu")


@cache
def mixed_builds() -> str:
    """What runs where several builds are installed, and how to mend it; empty for one build.

    Each writes its files over the other's, as where onnxruntime-genai brings plain ``onnxruntime``
    along: the one installed last runs, with what the other left beside it.
    """
    found = {name: there for name in BUILDS if (there := installed(name))}
    if len(found) < 2:
        return ""
    import onnxruntime as ort

    listed = " and ".join(f"{name} {there}" for name, there in found.items())
    runs = ", ".join(p.removesuffix("ExecutionProvider") for p in ort.get_available_providers())
    return (
        f"{listed} are both installed, in one folder; what runs is the one installed last, here "
        f"{ort.__version__} with {runs}. Keep one: pip uninstall -y {' '.join(found)}, then pip "
        f"install 'onnxruntime-gpu=={found['onnxruntime-gpu']}', or onnxruntime on a machine "
        "without a GPU"
    )


def installed(package: str) -> str:
    """The version of a package; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
