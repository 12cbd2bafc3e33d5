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
    versions = {name: there for name in BUILDS if (there := installed(name))}
    if len(versions) < 2:
        return ""
    import onnxruntime as ort

    listed = " and ".join(f"{name} {there}" for name, there in versions.items())
    runs = ", ".join(p.removesuffix("ExecutionProvider") for p in ort.get_available_providers())
    return (
        f"{listed} are both installed, in one folder; what runs is the one installed last, here "
        f"{ort.__version__} with {runs}. Keep one: pip uninstall -y {' '.join(versions)}, then pip "
        f"install 'onnxruntime-gpu=={versions['onnxruntime-gpu']}', or onnxruntime on a machine "
        "without a GPU"
    )


PROVIDER = "CUDAExecutionProvider"


def no_cuda() -> str:
    """Why ONNX Runtime and torch cannot work on a GPU together, and how to mend it; empty where
    they can, as far as their builds tell. Each may be a build for CUDA while the other is none."""
    import onnxruntime as ort
    import torch

    has_provider = PROVIDER in ort.get_available_providers()
    if not torch.cuda.is_available():
        built = torch.version.cuda
        here = "is a CPU build" if built is None else f"is built for CUDA {built}, and no driver is"
        text = f"torch sees no CUDA device: run with --device cpu; torch {torch.__version__} {here}"
        if built is not None:
            return f"{text} there: install NVIDIA's"
        other = ", unlike this ONNX Runtime, which has a CUDA provider" if has_provider else ""
        return f"{text}{other}: install one for CUDA (https://pytorch.org), and NVIDIA's driver"
    if has_provider:
        return ""
    mend = mixed_builds() or (
        f"torch {torch.__version__} is a build for CUDA, this ONNX Runtime is not: "
        "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    )
    return f"this ONNX Runtime has no CUDA provider: {mend}, or run with --device cpu"


def installed(package: str) -> str:
    """The version of a package; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
