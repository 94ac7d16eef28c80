"""Give up the rights of root for those of another user, for good.

A worker that launchd starts as root does so before it reads or writes anything that belongs to the user.
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

# Root's environment variables that name what another user cannot write to or has no use for.
_DROPPED = ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MAIL", "SUDO_COMMAND", "SUDO_USER")


class PrivilegeError(Exception):
    """The process cannot become that user; str() says why and how to remedy it."""


def is_other_user(name: str) -> bool:
    """Return whether this process has to become the user `name`, and may. Raises PrivilegeError if it may not."""
    try:
        wanted = pwd.getpwnam(name)
    except KeyError:
        raise PrivilegeError(f'--user is "{name}", expected a user of this host') from None
    if wanted.pw_uid == 0:
        raise PrivilegeError(f"--user is {name}, expected a user other than root; leave it out to run as root")
    if os.getuid() == os.geteuid() == wanted.pw_uid:
        return False
    if os.geteuid() != 0:
        me = pwd.getpwuid(os.geteuid()).pw_name
        raise PrivilegeError(f"--user is {name}, and only root can become that user, not {me}; start it with sudo")
    return True


def become_user(name: str) -> None:
    """Take on the groups, the ids and the environment of a user. There is no way back. Raises PrivilegeError.

    The working directory stays.
    """
    wanted = pwd.getpwnam(name)
    try:
        os.initgroups(name, wanted.pw_gid)
        os.setgid(wanted.pw_gid)
        # As root this sets the saved ids, too.
        os.setuid(wanted.pw_uid)
    except OSError as error:
        raise PrivilegeError(f"cannot become the user {name}: {error.strerror}") from error
    if _can_be_root_again():
        raise PrivilegeError(f"became the user {name}, and could still become root; this system is not supported")
    os.environ.update(HOME=wanted.pw_dir, USER=name, LOGNAME=name, SHELL=wanted.pw_shell)
    for variable in _DROPPED:
        os.environ.pop(variable, None)
    for needed in (Path(sys.executable), Path(os.__file__), Path(__file__)):
        if not os.access(needed, os.R_OK):
            raise PrivilegeError(
                f"the user {name} cannot read {needed}; install Python and Orchard where every user can"
            )


def _can_be_root_again() -> bool:
    for change in (os.setuid, os.seteuid):
        try:
            change(0)
        except PermissionError:
            continue
        return True
    return False
