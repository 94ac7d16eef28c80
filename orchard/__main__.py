"""`python -m orchard`: the `orchard` command."""

import sys

from orchard.cli import main

sys.exit(main())
