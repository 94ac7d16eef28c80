"""A controller that does not limit failed logins, for tests that have many."""

from orchard import controller
from orchard.decisions import login_limit


def main() -> int:
    login_limit.MAX_FAILURES = 1_000_000
    return controller.main()
