"""The first script that a new machine runs: it starts our supervisor, which does the rest."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATE = """\
#!/bin/sh
exec {command} {url}
"""


def script(url: str, command: Sequence[str]) -> str:
    """Write the script, for machines which have our program already.

    The URL says where the settings are; nothing secret is in it.
    """
    return TEMPLATE.format(command=" ".join(map(quote, command)), url=quote(url))
