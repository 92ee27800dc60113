"""A program of this computer that has the user's terminal for itself."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cml_runner import signals

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Program:
    """What to run; secrets stand in the variables, never among the arguments."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    directory: Path | None = None
    alone: bool = False  # with no other variables than these

    def run(self) -> int:
        """Run it until it ends; return its exit code. Ctrl-C is for it, not for us."""
        variables = {**({} if self.alone else os.environ), **self.environment}
        # A handler, since what is ignored would be ignored by the program, too.
        with signals.handled((signal.SIGINT,), lambda *_: None):
            process = subprocess.Popen(self.arguments, env=variables, cwd=self.directory)
            try:
                code = process.wait()
            finally:  # we may have been told to end
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return code if code >= 0 else 128 - code
