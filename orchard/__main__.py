"""`python -m orchard`, and the script `orchard` that an installation makes, are the `orchard` command."""

import sys

from orchard import end_at_interrupt


def main() -> int:
    """Run the command line, and return the exit status."""
    end_at_interrupt()
    # Its imports take most of the start.
    from orchard.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
