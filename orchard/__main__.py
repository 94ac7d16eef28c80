"""`python -m orchard` is the `orchard` command."""

import sys

from orchard.cli.main import main

sys.exit(main())
