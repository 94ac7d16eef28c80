"""Data about the cluster as a whole and about a worker's host, and their JSON.

`ClusterIdentity` and `Promise` are stored beside the resources of schema.py, and no client writes them. `Health`,
`WorkerDisk`, `Versions`, `CachedImage` and `ImagePull` are reported by workers with their heartbeats and kept in
memory. `Webhook` is a part of the cluster settings.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchard.codec import attr, shortened, unknown_fields

# Limits of one worker's report. A report is cut, because a refused heartbeat would end the worker's session.
MAX_PROBLEMS = 20
MAX_PROBLEM_TEXT = 300  # characters
_MAX_WHAT = 32  # characters

# The capability of a worker that sends `settled` and `health`, and of a controller that shows the state of workers.
WORKER_STATE = "worker-state"
# The capability of a worker that ends a request on `{"cancelRequestAction": {"session": S}}`.
CANCEL_REQUEST = "cancel-request"
# The capabilities of a worker that ends a VM which the controller has marked as failed and reports its end, and of one
# that reports the condition `ready`; also of a controller that supports this.
VM_RESTART, VM_READY = "vm-restart", "vm-ready"
# The capabilities of a worker that runs shutdown scripts, and of one that runs scripts by the guest agent.
SHUTDOWN_SCRIPT, GUEST_AGENT = "shutdown-script", "guest-agent"

# The capability of a worker that reports images and pulls those of `prepull`, and of a controller that shows them.
IMAGE_INVENTORY = "image-inventory"
# Limits of one worker's list. A longer list is cut, too.
MAX_IMAGES = 200
MAX_IMAGE_NAME = 512  # characters
# The most tunnels into one VM, and the most requests for it that wait for its worker. The worker takes as many together.
MAX_TUNNELS_OF_VM, MAX_PENDING_OF_VM = 1024, 256
# The most webhooks of a cluster.
MAX_WEBHOOKS = 10
_MAX_DIGEST, _MAX_VERSION = 256, 128  # characters

WebhookEvent = Literal["worker.offline", "worker.online", "vm.failed", "vm.unplaceable", "queue.old", "disk.low"]
WorkerState = Literal["offline", "drained", "draining", "paused", "online"]


@dataclass(frozen=True, slots=True)
class HealthProblem:
    what: str = attr("what", "What fails, for example `list`, `clone` or `start`", zero="")
    since: datetime.datetime | None = attr("since", "When it began to fail", zero=None)
    message: str = attr("message", "Why, on one line", zero="")


@dataclass(frozen=True, slots=True)
class Health:
    ok: bool = attr("ok", "Whether there is no problem", zero=True, default=True)
    problems: tuple[HealthProblem, ...] = attr("problems", "What fails on the worker", zero=(), default=[])


@dataclass(frozen=True, slots=True)
class WorkerDisk:
    total_bytes: int = attr("totalBytes", "Size of the file system", zero=0)
    free_bytes: int = attr("freeBytes", "Bytes that are free", zero=0, default=0)


@dataclass(frozen=True, slots=True)
class Versions:
    orchard: str = attr("orchard", "Version of the worker", zero="")
    tart: str = attr("tart", "Version of Tart", zero="")
    os: str = attr("os", "Version of the operating system", zero="")


@dataclass(frozen=True, slots=True)
class CachedImage:
    name: str = attr("name", "Image", zero="")
    digest: str = attr("digest", "Digest of the image", zero="")
    size_bytes: int = attr("sizeBytes", "Bytes on the disk", zero=0)
    last_used: datetime.datetime | None = attr("lastUsed", "When a VM was last made from it", zero=None)

    def names(self) -> tuple[str, ...]:
        """Return the names under which VMs may ask for it: as it is, by digest, and without ":latest"."""
        tagged = self.name.partition("@")[0]
        repository, colon, tag = tagged.rpartition(":")
        # A colon before a slash belongs to the port of a registry.
        if not colon or "/" in tag:
            repository, tag = tagged, ""
        by_digest = (f"{repository}@{self.digest}",) if self.digest else ()
        return tuple(dict.fromkeys((self.name, *by_digest, *((repository,) if tag == "latest" else ()))))


@dataclass(frozen=True, slots=True)
class ImagePull:
    image: str = attr("image", "Image that is being pulled in advance", zero="")
    percent: int = attr("percent", "How much of it is on the disk, from 0 to 100", zero=0, default=0)


@dataclass(frozen=True, slots=True)
class Webhook:
    url: str = attr("url", "http:// or https:// URL that is sent POST requests", zero="", secret=True)
    events: tuple[WebhookEvent, ...] = attr("events", "What is sent; none: everything", zero=())
    secret: str = attr(
        "secret", "Key of the signature, never shown; absent: the one that the URL has", zero="", secret=True
    )
    status: str = attr("status", "What became of the last request", zero="", writer="controller")


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """The identity of a state, and whether the state is older than one that workers have seen."""

    id: str = attr("id", "Identity of the state", writer="controller")
    restored_from: int = attr(
        "restoredFrom",
        "The revision that workers saw before an older state was restored; 0 once the state is accepted",
        zero=0,
        writer="controller",
    )
    holds_back: bool = attr(
        "holdsBack",
        "Whether VMs that were in the restored state may still run where it does not show them",
        zero=False,
        writer="controller",
    )
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class Promise:
    """The offline timeout of a deleted worker, which may run its VMs for that long."""

    name: str = attr("name", "Name of the deleted worker", writer="controller")
    milliseconds: int = attr("milliseconds", "The offline timeout", zero=0, writer="controller")
    unknown: Mapping[str, Any] = unknown_fields()


@dataclass(frozen=True, slots=True)
class ControllerHealth:
    """The answer of `GET /health`, with status 200 for the role `leader` and with 503 for others."""

    role: Literal["leader", "standby"] = attr("role", "Whether this controller leads the cluster", default="leader")
    writes: Literal["", "ok", "refused"] = attr(
        "writes", "Whether a leader takes changes that add something: `refused` while its disk is full", zero=""
    )
    leader: str = attr("leader", "URL of the controller that leads, as far as a standby knows it", zero="")


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    registered: int = attr("registered", "All workers", zero=0, default=0)
    online: int = attr("online", "Workers in the state `online`", zero=0, default=0)
    paused: int = attr("paused", "Workers in the state `paused`", zero=0, default=0)
    draining: int = attr("draining", "Workers in the state `draining` or `drained`", zero=0, default=0)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The capacity for VMs of one shape. `total`, `used` and `free` are of the matching workers that are online."""

    workers: WorkerCounts = attr("workers", "Number of workers, whether or not they match")
    total: Mapping[str, int] = attr("total", "Resources of the matching workers that are online", zero={}, default={})
    used: Mapping[str, int] = attr("used", "How much of them VMs use", zero={}, default={})
    free: Mapping[str, int] = attr("free", "How much of them is free, worker by worker", zero={}, default={})
    fits: int = attr("fits", "VMs of this shape that could start now", zero=0, default=0)
    queued: int = attr("queued", "VMs that wait for a worker", zero=0, default=0)
    queued_ahead: int = attr("queuedAhead", "Those of them that may want the same workers", zero=0, default=0)
    reason: str = attr("reason", "Why none fits", zero="", default="")


def bounded(health: Health) -> Health:
    """Return a reported health with at most MAX_PROBLEMS problems, each of whose texts is one short line."""
    problems = tuple(
        replace(problem, what=_one_line(problem.what, _MAX_WHAT), message=_one_line(problem.message, MAX_PROBLEM_TEXT))
        for problem in health.problems[:MAX_PROBLEMS]
    )
    return Health(ok=not problems, problems=problems)


def bounded_images(images: Iterable[CachedImage]) -> tuple[CachedImage, ...]:
    """Return at most MAX_IMAGES reported images, those that were used last, without any whose texts are too long.

    They are in the order of their names, so that equal caches are equal reports.
    """
    fitting = [
        image
        for image in images
        if image.name.isascii() and image.name.isprintable() and 0 < len(image.name) <= MAX_IMAGE_NAME
        if image.digest.isascii() and image.digest.isprintable() and len(image.digest) <= _MAX_DIGEST
    ]
    never = datetime.datetime.min.replace(tzinfo=datetime.UTC)
    fitting.sort(key=lambda image: image.last_used or never, reverse=True)
    return tuple(sorted(fitting[:MAX_IMAGES], key=lambda image: image.name))


def bounded_versions(versions: Versions) -> Versions:
    """Return reported versions, each on one short line."""
    return Versions(*(_one_line(text, _MAX_VERSION) for text in (versions.orchard, versions.tart, versions.os)))


def bounded_pull(pull: ImagePull) -> ImagePull:
    """Return a reported pull with a short name and a percentage."""
    return ImagePull(_one_line(pull.image, MAX_IMAGE_NAME), min(pull.percent, 100))


def merge(*parts: Iterable[HealthProblem]) -> Health:
    """Return the health with the problems of all parts."""
    problems = tuple(problem for part in parts for problem in part)[:MAX_PROBLEMS]
    return Health(ok=not problems, problems=problems)


def _one_line(text: str, limit: int) -> str:
    return shortened(" ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split()), limit)
