"""Adapters that lie in a model's folder, as Phi-4-multimodal's of images and of sounds do."""

from __future__ import annotations

from pathlib import Path

CONFIG = "adapter_config.json"


def adapter_notes(folder: Path) -> tuple[str, ...]:
    """What a person should know of folders of PEFT in this one: transformers loads none by itself,
    and no pass has been told of any."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        return ()
    note = f"adapters in its folder are not applied: {', '.join(found)}. "
    return (f"{note}-p 'adapter{{path={folder / found[0]}}}' folds one",)
