"""Two files in a worker's directory: its identity, and the newest state of the cluster that it has seen.

The identity tells a worker that was given another name from another worker. The newest state is a cluster's id and the
highest revision in the controller's answers. A lower one later means that the controller was restored from an older
state, which does not know what happened since. The worker touches nothing then until an operator accepts that state,
which gives it another id.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

from orchard.base.files import INSTANCE_ID_FILE, make_private, write_private
from orchard.codec import load_json

_ID = re.compile(r"[0-9a-f]{32}")

_logger = logging.getLogger("orchard.worker")


def read_instance_id(directory: Path) -> str:
    """Return the identity of the workers in a directory. It is made at the first call. Raises OSError."""
    # Windows has no fcntl, and no worker runs there.
    import fcntl

    make_private(directory)
    path = directory / INSTANCE_ID_FILE
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Workers of several names may start at the same time, and must make one identity.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            text = path.read_text("ascii", "replace").strip()
            if _ID.fullmatch(text):
                return text
        made = uuid.uuid4().hex
        write_private(path, f"{made}\n".encode())
        return made
    finally:
        os.close(descriptor)


class ClusterMemory:
    """The cluster that a worker belongs to, and the highest revision of its state. Kept in a file if there is a path.

    A crash of the machine may lose the file. Then the worker knows no revision.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.cluster_id = ""
        self.highest = 0
        # Whether the controller's state is older than one that it has shown.
        self.is_restored = False
        self._path = path
        if path is not None:
            with suppress(OSError, ValueError):
                match load_json(path.read_bytes()):
                    case [str(cluster_id), int(highest)]:
                        self.cluster_id, self.highest = cluster_id, highest

    def observe(self, cluster_id: str, revision: int) -> None:
        """Note the cluster's id and the revision that the controller shows. Both are empty if it shows none."""
        if not cluster_id or not revision:
            self.is_restored = False
            return
        # A restored controller goes on counting, so only another id ends this.
        if cluster_id == self.cluster_id and (self.is_restored or revision < self.highest):
            self.is_restored = True
            return
        if (cluster_id, revision) != (self.cluster_id, self.highest):
            self.cluster_id, self.highest = cluster_id, revision
            self._save()
        self.is_restored = False

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            # Not synced: it changes with every change of the cluster, and only a crash of the machine loses it.
            write_private(self._path, json.dumps([self.cluster_id, self.highest]).encode(), durable=False)
        except OSError as error:
            _logger.warning("cannot write the cluster's revision", extra={"reason": f"{self._path}: {error.strerror}"})
