"""Where the directories lead that a VM mounts from its host, and whether the cluster's policies allow that.

The controller checks the text of a path. Only the host knows its symbolic links. `resolve_dirs` follows them, for the
policies' prefixes as well (`/tmp` is a link on macOS), and the VM mounts the resolved path. So a link that is changed
afterwards has no effect. A directory on the resolved path that is replaced by a link between this check and tart's use
of it is not noticed: docs/threats.md says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import trio

from orchard.codec import shown
from orchard.schema import HostDir, HostDirPolicy, is_allowed
from orchard.vm.driver import DriverError, SharedDir

# What tart's --dir option splits at.
_SEPARATORS = ":,"


async def resolve_dirs(dirs: Sequence[SharedDir], policies: Sequence[HostDirPolicy] | None) -> tuple[SharedDir, ...]:
    """Return the directories with the paths to which they lead on this host. Archives (https://) stay as they are.

    `policies` are the cluster's; None: the controller does not tell them, and the paths are mounted as they are.
    Raises DriverError for a path that leads to where no policy allows it.
    """
    if policies is None or not dirs:
        return tuple(dirs)
    # Links may lead to a file server that does not answer.
    return await trio.to_thread.run_sync(_resolve, dirs, policies, abandon_on_cancel=True)


def _resolve(dirs: Sequence[SharedDir], policies: Sequence[HostDirPolicy]) -> tuple[SharedDir, ...]:
    real = [
        replace(policy, path_prefix=os.path.realpath(policy.path_prefix))
        for policy in policies
        if policy.path_prefix.startswith("/")
    ]
    return tuple(_resolve_one(index, dir_, real) for index, dir_ in enumerate(dirs))


def _resolve_one(index: int, dir_: SharedDir, policies: Sequence[HostDirPolicy]) -> SharedDir:
    if not dir_.path.startswith("/"):
        return dir_
    path = os.path.realpath(dir_.path)
    wanted = f"hostDirs[{index}].path: {shown(dir_.path)} leads to {shown(path)} on this host"
    if any(separator in path for separator in _SEPARATORS):
        raise DriverError(f'{wanted}, expected a path without ":" and ","')
    if not is_allowed(policies, HostDir(dir_.name, path, dir_.ro)):
        access = "read only" if dir_.ro else "writable"
        raise DriverError(f"{wanted}, where no hostDirPolicy allows it {access}; see the cluster settings")
    return replace(dir_, path=path)
