"""Allow ``python -m cml_runner``."""

from cml_runner.cli import main

if __name__ == "__main__":
    main()
