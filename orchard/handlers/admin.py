"""Handlers of the controller itself, of service accounts and of the cluster settings."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from orchard import __version__, auth
from orchard.api import API
from orchard.handlers.admission import Admitted, read_body
from orchard.handlers.answers import found
from orchard.net.request import AnyResponse, HTTPError, Request, Response
from orchard.resources import validation
from orchard.resources.bodies import ControllerInfo
from orchard.resources.cluster import (
    GUEST_AGENT,
    IMAGE_INVENTORY,
    SHUTDOWN_SCRIPT,
    VM_READY,
    VM_RESTART,
    WORKER_STATE,
    ControllerHealth,
)
from orchard.resources.json_text import dump_resource
from orchard.schema import ClusterSettings, ServiceAccount
from orchard.store import Store

# The capabilities of the controller. Existing workers choose their protocol by the first two.
_CAPABILITIES = (
    "rpc-v2",
    "vm-state-endpoint",
    WORKER_STATE,
    IMAGE_INVENTORY,
    VM_READY,
    SHUTDOWN_SCRIPT,
    GUEST_AGENT,
    "field-validation",
    "vm-metadata",
    "watch-list",
    "placement",
    "wait-for",
    "events-follow",
    "history",
    "capacity",
    "vm-ttl",
    "pending-timeout",
    VM_RESTART,
    "drain",
    "sessions",
    "metrics",
    "webhooks",
)


def hello(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return Response(200)


def info(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    # Rounded down: a worker must give up its VMs before the controller does.
    timeout = int(1000 * api.parts.offline_timeout)
    settings = api.state.settings if api.may(admitted, "compute:write") else ClusterSettings()
    info = ControllerInfo(
        version=__version__,
        capabilities=(*_CAPABILITIES, "ui") if api.has_pages else _CAPABILITIES,
        worker_offline_timeout=timeout,
        cluster_id=api.state.cluster.id,
        host_dir_policies=settings.host_dir_policies,
        prepull=settings.prepull,
        account=admitted.account,
        roles=api.roles(admitted),
    )
    return Response(200, dump_resource(info))


def health(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return health_answer(api.store)


def health_answer(store: Store) -> Response:
    """Return the answer to a health check. A full disk does not cut off reads and reports, so it has status 200."""
    if not store.leads():
        return Response(503, dump_resource(ControllerHealth("standby")))
    return Response(200, dump_resource(ControllerHealth("leader", "refused" if store.full else "ok")))


def accept_state(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    """Accept a state that was restored from an older copy, which workers have noticed."""
    old = api.state.cluster
    # A registration that was sent before may still arrive.
    api.accepted_revision = max(old.restored_from, api.accepted_revision)
    holds_back = bool(old.restored_from) or old.holds_back
    api.put(replace(old, id=uuid.uuid4().hex, restored_from=0, holds_back=holds_back), old)
    return info(api, request, admitted)


def list_sessions(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return api.answer_list((dump_resource(each) for each in api.parts.sessions.list_open()), headers=())


def describe(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return Response(200, api.document)


def create_account(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    wanted = read_body(admitted, validation.account_from_client)
    if wanted.name in api.state.accounts:
        raise HTTPError(409, f'service account "{wanted.name}" already exists')
    new = replace(wanted, token=wanted.token or auth.random_token(), created_at=api.parts.clock())
    api.put(new)
    if not new.roles:
        admitted.remarks.notes.append("the account has no roles, so it can do nothing but check its credentials")
    return _changed_account(api, admitted, new)


def _changed_account(api: API, admitted: Admitted, new: ServiceAccount, old: ServiceAccount | None = None) -> Response:
    if (old is None or new.token != old.token) and len(new.token) < validation.LONG_TOKEN:
        note = f"the token has fewer than {validation.LONG_TOKEN} characters and may be guessed"
        admitted.remarks.notes.append(note)
    return Response(200, _account_json(api, admitted, new.name))


def _account_json(api: API, admitted: Admitted, name: str) -> bytes:
    """Return an account's JSON, with its token only for an account that could change it."""
    if api.may(admitted, "admin:write"):
        return api.state.json["account"][name]
    return dump_resource(replace(api.state.accounts[name], token=""))


def list_accounts(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return api.answer_list(_account_json(api, admitted, name) for name in api.state.names["account"])


def get_account(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    name = found("service account", api.state.accounts, admitted.name).name
    return Response(200, _account_json(api, admitted, name))


def replace_account(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return _change_account(api, admitted, validation.account_from_client)


def patch_account(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return _change_account(api, admitted, validation.patched_account)


def _change_account(api: API, admitted: Admitted, read: Callable[..., ServiceAccount]) -> AnyResponse:
    """Change an account's roles, token and keys; absent fields stay as they are."""
    old = found("service account", api.state.accounts, admitted.name)
    new = read_body(admitted, partial(read, base=old), is_named=True)
    new = replace(new, token=new.token or old.token)
    api.put(new, old)
    return _changed_account(api, admitted, new, old)


def delete_account(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    return api.delete(found("service account", api.state.accounts, admitted.name))


def get_settings(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    settings = api.state.settings
    # A secret is never shown again.
    shown = [replace(one, secret="", status=api.parts.webhooks.status(one.url)) for one in settings.webhooks]
    return Response(200, dump_resource(replace(settings, webhooks=tuple(shown))))


def put_settings(api: API, request: Request, admitted: Admitted) -> AnyResponse:
    old = api.state.settings
    api.put(read_body(admitted, partial(validation.replaced_settings, old)), old)
    return get_settings(api, request, admitted)
