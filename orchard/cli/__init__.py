"""The `orchard` command; `orchard.cli.main.main` runs it."""
