"""Orchard: an orchestrator for Tart virtual machines on a cluster of Macs.

This file holds the version and nothing else, so that importing one room of the house never pulls in another.
`python -m orchard.controller` and `python -m orchard.worker` are the two daemons, `orchard.testing` a whole cluster
inside somebody's test suite, `orchard.client` the API as methods, `python -m orchard` the command for people.
"""

__version__ = "0.1.0"
