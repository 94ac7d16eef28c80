"""The methods of /service-accounts and /cluster-settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from orchard.methods.common import JSON, ResourceMethods, url_path
from orchard.methods.fields import SettingsFields, fields_to_json
from orchard.schema import ClusterSettings, ServiceAccount


class ServiceAccounts(ResourceMethods):
    """The methods of /service-accounts."""

    async def create(
        self, name: str, *, roles: Sequence[str] = (), token: str = "", authorized_keys: Sequence[str] = ()
    ) -> ServiceAccount:
        """Create an account, and return it with its token. Without a `token` the controller makes a random one.

        Raises ResponseError: 409 if the name is taken, 412 for an invalid field.
        """
        optional = {"token": token, "authorizedKeys": list(authorized_keys)}
        body = {"name": name, "roles": list(roles), **{key: value for key, value in optional.items() if value}}
        return await self._fetch(ServiceAccount, "POST", "/service-accounts", json=body)

    async def get(self, name: str) -> ServiceAccount:
        """Return an account. Raises ResponseError: 404."""
        return await self._fetch(ServiceAccount, "GET", url_path("service-accounts", name))

    async def list(self) -> list[ServiceAccount]:
        """Return all accounts."""
        return await self._fetch_list(ServiceAccount, "/service-accounts")

    async def replace(
        self,
        name: str,
        *,
        roles: Sequence[str] | None = None,
        token: str | None = None,
        authorized_keys: Sequence[str] | None = None,
    ) -> ServiceAccount:
        """Change what is not None of an account, and return it. Raises ResponseError: 404, 412."""
        given = {"roles": roles, "token": token, "authorizedKeys": authorized_keys}
        body = {"name": name, **{key: value for key, value in given.items() if value is not None}}
        return await self._fetch(ServiceAccount, "PUT", url_path("service-accounts", name), json=body)

    async def delete(self, name: str) -> None:
        """Delete an account. Raises ResponseError: 404."""
        await self._transport.request("DELETE", url_path("service-accounts", name))


class Settings(ResourceMethods):
    """The methods of /cluster-settings."""

    async def get(self) -> ClusterSettings:
        """Return the settings."""
        return await self._fetch(ClusterSettings, "GET", "/cluster-settings")

    async def put(self, settings: JSON | None = None, /, **fields: Unpack[SettingsFields]) -> ClusterSettings:
        """Replace the settings by a JSON object, by fields (`max_ttl_seconds`, ...), or both. Return them.

        Without `hostDirPolicies` or `schedulerProfile` these get their defaults; other omitted fields keep their
        values. Raises ResponseError: 400.
        """
        body = {**(settings or {}), **fields_to_json(ClusterSettings, fields)}
        return await self._fetch(ClusterSettings, "PUT", "/cluster-settings", json=body)
