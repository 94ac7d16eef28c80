"""Orchard: an orchestrator for Tart virtual machines on a cluster of Macs.

This file holds only the version, so that importing one module never imports the others. `python -m orchard.controller`
and `python -m orchard.worker` are the two daemons, `python -m orchard` is the command for people, `orchard.client` has
the API as methods, and `orchard.testing` runs a whole cluster inside a test suite.
"""

__version__ = "0.1.0"
