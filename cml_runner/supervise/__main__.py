"""Be a machine's supervisor: ``python -m cml_runner.supervise URL``.

The same as ``cml-runner supervise URL``, in less memory: machines run this for days.
"""

import os
import sys
from pathlib import Path

import cml_runner
from cml_runner import boot, logs
from cml_runner.boot.prepare import IMAGES_PATH
from cml_runner.errors import RunnerError
from cml_runner.supervise import run


def main() -> int:
    """Live; return the exit code."""
    logs.set_up(stamped=True)
    _forget_own_path(Path(cml_runner.__file__).parents[1])
    try:
        return run(sys.argv[1])
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        boot.leave_word(sys.argv[1], str(error))
        return error.exit_code


def _forget_own_path(path: Path) -> None:
    """Take from jobs what lets Python find this program: it is none of their business."""
    first, _, rest = os.environ.pop("PYTHONPATH", "").partition(os.pathsep)
    kept = rest if first == str(path) else os.pathsep.join(filter(None, (first, rest)))
    kept = os.environ.pop(IMAGES_PATH, "") or kept
    if kept:
        os.environ["PYTHONPATH"] = kept


if __name__ == "__main__":
    sys.exit(main())
