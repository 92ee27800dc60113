"""Be a keeper."""

import sys
from pathlib import Path

from cml_runner.clouds.local import keeper

if __name__ == "__main__":
    keeper.main(Path(sys.argv[1]))
