"""Who may ask: requests that web pages of other sites have a browser send are refused.

A page may send requests to any server that its browser reaches, also to one that listens on this machine only. Browsers
state the page's origin in `Origin`, and the name by which it found the server in `Host`; a page whose own name was made
to lead here, which is called rebinding, is told by that name. Other clients state no origin.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from omni_jax.serve.errors import RequestError


@dataclass(frozen=True)
class Doors:
    """Names of the server, and origins of pages that may use it.

    listens: the name that it listens at. hosts: others, "*.example.com" for those below a name; a page may lie there
    too, on the usual port. origins: of other pages, such as "https://example.com"; "*" for all. any_host: whether it
    may be called by any name. Addresses and localhost are its names too.
    """

    listens: str = "localhost"
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    any_host: bool = False

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """RequestError 403 for a request of another site's page; headers: by their names in lower case."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if host and not self.any_host and not self._is_own(_name_of(host)):
            raise RequestError(403, f"the header Host names {host[:80]!r}, which is no name of this server; call it by "
                               "its address, or start it with --allowed-hosts", code="wrong_host")  # fmt: skip
        if (origin := headers.get(b"origin")) is None:
            return
        stated = origin.decode("latin-1").lower()
        if not ({"*", stated} & {*self.origins} or self._is_of_own_page(stated, host)):
            raise RequestError(403, f"pages of {stated[:80]!r} may not use this server; start it with "
                               "--allowed-origins, or with --allowed-hosts if that is its own name",
                               code="wrong_origin")  # fmt: skip

    def _is_of_own_page(self, origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and (parts.netloc == host or self._is_named(parts.netloc))

    def _is_own(self, name: str) -> bool:
        return name in ("localhost", self.listens) or _is_address(name) or self._is_named(name)

    def _is_named(self, name: str) -> bool:
        """Whether a name is stated as one of the server's."""
        return any(name == one or one.startswith("*.") and name.endswith(one[1:]) for one in self.hosts)


def _name_of(host: str) -> str:
    """The name or address in "name:port" or "[address]:port"."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.removesuffix(".")


def _is_address(name: str) -> bool:
    """Whether a name is an address, which cannot be made to lead elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
