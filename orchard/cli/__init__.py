"""The `orchard` command; its entry point is `orchard.cli.main:main`."""
