"""What a file says where flags say nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from cml_runner.errors import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

FILE, SECTION = "task.toml", "pyproject.toml"
# What terraform-provider-iterative has in a block.
STORAGE = ("workdir", "output", "exclude", "container", "container_opts")
LISTS = ("environment", "exclude", "storage_container_opts", "tags")
FLAGS = ("no_machine_proxy",)


def read(directory: Path, known: Collection[str]) -> dict[str, Any]:
    """Read task.toml, else the section in pyproject.toml; the keys are those which are known.

    Raises ConfigurationError with every mistake.
    """
    for name in (FILE, SECTION):
        if not (directory / name).is_file():
            continue
        try:
            found = tomllib.loads((directory / name).read_text())
        except (OSError, ValueError) as error:
            msg = f"{name}: {error}"
            raise ConfigurationError(msg) from error
        if name == SECTION:
            found = found.get("tool", {}).get("cml-runner", {}).get("task", {})
        if found:
            return _words(name, found, known)
    return {}


def _words(name: str, found: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Take keys as flags have them, or as terraform-provider-iterative does."""
    flat = {key.replace("-", "_"): value for key, value in found.items()}
    storage = flat.pop("storage", {})
    mistakes = []
    if isinstance(storage, dict):
        mistakes += [f"{name}: storage.{key} is unknown" for key in storage if key not in STORAGE]
        own = {key: key.replace("container", "storage_container") for key in STORAGE}
        flat |= {own[key]: value for key, value in storage.items() if key in STORAGE}
    mistakes += [f"{name}: {key} is unknown" for key in flat if key not in known]
    if mistakes:
        raise ConfigurationError(*mistakes)
    return {key: _word(key, value) for key, value in flat.items()}


def _word(key: str, value: Any) -> str | bool | tuple[str, ...]:
    if key in FLAGS:
        return str(value).lower() == "true"
    if isinstance(value, dict):
        return tuple(f"{name}={text}" if text != "" else name for name, text in value.items())
    if isinstance(value, list):
        return tuple(map(str, value))
    return (str(value),) if key in LISTS else str(value)
