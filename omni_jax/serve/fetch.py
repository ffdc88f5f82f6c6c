"""Fetching media from the few hosts that the server may ask, and from nowhere else.

A client that may make a server fetch URLs can otherwise reach what only the server can: its own machine, its network,
and the metadata of its cloud. So the host of every hop, redirects too, must be an allowed one; its name is resolved
once, all its addresses must be public, and the connection goes to an address that was checked. Size and time are
bounded, and nothing about the answer but its bytes is used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from omni_jax.files import reason_of
from omni_jax.serve.errors import RequestError, invalid, too_large

MOST_REDIRECTS = 5
PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_READ_BYTES = 1 << 16
# Characters of a URL that are sent as they are; "%" begins what is encoded already.
_PATH, _QUERY = "/%:@!$&'()*+,;=~-._", "/%:@!$&'()*+,;=~-._?[]"
# IPv6 addresses that hold an IPv4 address in their last bytes, and may be routed to it.
_HOLDING = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
# IPv6 addresses of a network's own translator to IPv4, which `is_global` of older Pythons does not know.
_TRANSLATOR = ipaddress.IPv6Network("64:ff9b:1::/48")
# A host of Azure that answers its machines only, by a public address.
_AZURE = ipaddress.IPv4Address("168.63.129.16")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, wherever it wraps another one too."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local or ip in _TRANSLATOR:
            return False
        if any(ip in network for network in _HOLDING):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        wrapped = (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ()))
        inner += [one for one in wrapped if one is not None]
        if ip.ipv4_mapped is not None:
            inner.remove(ip)
    return all(one.is_global and not one.is_multicast and one != _AZURE for one in inner)


@dataclass(frozen=True)
class Reach:
    """What may be fetched.

    domains: hosts, "example.com" or "*.example.com" for those below it, with ":port" unless the port is that of http or
    https. seconds: for one medium, with all redirects. may_connect: whether an address may be connected to.
    """

    domains: Sequence[str] = ()
    seconds: float = 30.0
    may_connect: Callable[[str], bool] = is_public

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether a host, in lower case, may be asked at a port."""
        for domain in self.domains:
            name, _, stated = domain.lower().rpartition(":") if _has_port(domain) else (domain.lower(), "", "")
            if port != (int(stated) if stated else PORTS[scheme]):
                continue
            if host == name or name.startswith("*.") and host.endswith(name[1:]) and host != name[2:]:
                return True
        return False


def _has_port(domain: str) -> bool:
    name, colon, port = domain.rpartition(":")
    return bool(colon) and port.isdigit() and (":" not in name or name.endswith("]"))


def fetch(url: str, most_bytes: int, reach: Reach) -> bytes:
    """The bytes at a URL; blocks for at most about `reach.seconds`.

    Raises RequestError for a URL that may not be fetched, that cannot be, or that has more than `most_bytes` bytes.
    """
    deadline = time.monotonic() + reach.seconds
    for _ in range(MOST_REDIRECTS + 1):
        parts = _checked(url, reach)
        answer = _get(parts, _address(parts, reach), most_bytes, deadline, reach.seconds)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise invalid(f"{_shown(url)}: more than {MOST_REDIRECTS} redirects; send the URL they lead to")


def _checked(url: str, reach: Reach) -> SplitResult:
    """A URL in its parts, of an allowed host."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip(".").lower(), parts.port or PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise invalid(f"{_shown(url)}: no valid URL ({reason_of(error)})") from None
    if parts.scheme not in PORTS or not host:
        raise invalid(f"{_shown(url)}: only http and https are fetched; send a data: URL")
    if parts.username is not None or parts.password is not None:
        raise invalid(f"{_shown(url)}: URLs with a user or password are not fetched")
    if not reach.allows(host, port, parts.scheme):
        raise invalid(f"{_shown(url)}: nothing is fetched from this host; send a data: URL, or ask who runs the server "
                      "for --allowed-media-domains")  # fmt: skip
    return parts


def _address(parts: SplitResult, reach: Reach) -> tuple[str, int]:
    """The one address that a host is connected to; all that its name resolves to must be allowed."""
    host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(host.encode("idna").decode(), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise invalid(f"the host {host[:80]!r} cannot be found ({reason_of(error)})") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(reach.may_connect(address) for address in addresses):
        raise invalid(f"the host {host[:80]!r} is not on the public internet; nothing is fetched from there")
    return addresses[0], port


def _get(parts: SplitResult, address: tuple[str, int], most_bytes: int, deadline: float, seconds: float) -> bytes | str:
    """The bytes of one hop, or the URL that it redirects to."""
    url = _shown(parts.geturl())
    connection = _Pinned(parts, address, max(deadline - time.monotonic(), 0.001))
    # However slowly bytes come, the connection ends in time.
    watchdog = threading.Timer(max(deadline - time.monotonic(), 0), connection.cut)
    watchdog.daemon = True
    watchdog.start()
    try:
        target = quote(parts.path or "/", _PATH) + (f"?{quote(parts.query, _QUERY)}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "*/*", "User-Agent": "omni-jax"})
        answer = _read(connection.getresponse(), url, most_bytes)
        if connection.is_cut:  # which looks like the end of an answer that states no length
            raise TimeoutError
        return answer
    except (OSError, ValueError, http.client.HTTPException) as error:
        late = connection.is_cut or time.monotonic() >= deadline
        reason = f"it took more than {seconds:g} s" if late else reason_of(error) or type(error).__name__
        raise invalid(f"{url}: cannot be fetched ({reason}); send a data: URL") from None
    finally:
        watchdog.cancel()
        connection.close()


def _read(response: http.client.HTTPResponse, url: str, most_bytes: int) -> bytes | str:
    """The body of an answer, or where it redirects to."""
    if response.status in _REDIRECTS and (location := response.getheader("Location")):
        return location
    if response.status != 200:
        raise invalid(f"{url}: its host answers {response.status}; check the URL, or send a data: URL")
    stated = response.getheader("Content-Length") or ""
    if stated.isdigit() and int(stated[:20]) > most_bytes:
        raise _too_large(url, most_bytes)
    data = bytearray()
    while block := response.read(_READ_BYTES):
        data += block
        if len(data) > most_bytes:
            raise _too_large(url, most_bytes)
    if stated.isdigit() and len(data) < int(stated[:20]):
        raise http.client.IncompleteRead(bytes(data))
    return bytes(data)


def _too_large(url: str, most_bytes: int) -> RequestError:
    return too_large(f"{url}: more than {most_bytes:,} bytes, which are left of the media of one request")


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that was checked, in the name of the host."""

    def __init__(self, parts: SplitResult, address: tuple[str, int], timeout: float):
        super().__init__((parts.hostname or "").rstrip("."), address[1], timeout=timeout)
        self._address, self._secure, self.is_cut = address, parts.scheme == "https", False
        self.default_port = PORTS[parts.scheme]

    def connect(self) -> None:
        """Connect to the address; of https, the certificate must be the host's."""
        plain = socket.create_connection(self._address, self.timeout)
        self.sock = plain
        if self._secure:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)

    def cut(self) -> None:
        """End it from another thread."""
        self.is_cut = True
        if self.sock is not None:
            try:
                self.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return


def _shown(url: str) -> str:
    return repr(url if len(url) <= 120 else f"{url[:117]}...")
