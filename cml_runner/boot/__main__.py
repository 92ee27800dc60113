"""``python3 -m cml_runner.boot machine|container|end URL``: see the package."""

from __future__ import annotations

import sys

from cml_runner.boot.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
