"""Which versions of what made a result."""

from __future__ import annotations

import platform

from llmctl import __version__


def versions() -> dict[str, str]:
    """Installed versions of the libraries a result depends on, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"llmctl": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "peft", "trl", "datasets", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
