"""Be a machine's supervisor: ``python -m cml_runner.supervise URL``.

The same as ``cml-runner supervise URL``, in less memory: machines run this for days.
"""

import sys

from cml_runner import logs
from cml_runner.errors import RunnerError
from cml_runner.supervise import run


def main() -> int:
    """Live; return the exit code."""
    logs.set_up(stamped=True)
    try:
        return run(sys.argv[1])
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
