"""Images from the web: only from hosts that the operator named, and never from inside the network.

A server that fetches URLs for strangers is a way into the network it stands in (server-side request
forgery). So a name is resolved once, all its addresses are judged, and the connection goes to a
judged address: a second answer of the name server changes nothing. Redirects start over.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import SplitResult, urljoin, urlsplit

from glmcompile.errors import InputError

MAX_REDIRECTS = 3

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def fetch(url: str, where: str, hosts: Sequence[str], timeout: float, max_bytes: int) -> bytes:
    """The body of an `https://` URL.

    where: names the URL in errors.
    hosts: patterns of allowed hosts (`fnmatch`), with `:port` for other ports than 443.
    timeout: seconds for all of it but the look-up of names, which the system's resolver bounds.
    Raises InputError for a URL that is not allowed, that leads to an address which is not public,
    that fails, or whose body has more than max_bytes.
    """
    deadline = time.monotonic() + timeout
    for _ in range(MAX_REDIRECTS + 1):
        parts = _allowed(url, where, hosts)
        body, location = _get(parts, where, deadline, max_bytes)
        if body is not None:
            return body
        try:
            url = urljoin(url, location)
        except ValueError:
            raise InputError(f"{where}: redirected to what is no valid URL") from None
    raise InputError(f"{where}: more than {MAX_REDIRECTS} redirects")


def is_public(address: Address) -> bool:
    """Whether an address lies in the public internet, and so does one that it stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if address.sixtofour is not None and not is_public(address.sixtofour):
            return False
        if address.is_site_local or address in _LOCAL_NAT64:
            return False
    # `is_global` alone takes multicast for global.
    return address.is_global and not (
        address.is_private or address.is_multicast or address.is_reserved
    )


class _PinnedConnection(http.client.HTTPSConnection):
    """TLS for a host's name, to addresses that were judged before."""

    def __init__(self, host: str, port: int, addresses: Sequence[Address], deadline: float) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, port, context=self._tls)
        self._addresses = addresses
        self._deadline = deadline

    def connect(self) -> None:
        for address in self._addresses:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            try:
                self.sock = socket.create_connection((str(address), self.port), left)
                break
            except OSError:
                if address == self._addresses[-1]:
                    raise
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


def _allowed(url: str, where: str, hosts: Sequence[str]) -> SplitResult:
    """The URL's parts, when the policy names its host."""
    if not hosts:
        raise InputError(f"{where}: images are not fetched; give a file or a data: URL instead")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or 443
    except ValueError:
        raise InputError(f"{where}: not a valid URL") from None
    if parts.scheme != "https":
        raise InputError(f"{where}: only https:// images are fetched")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{where}: URLs with a user name are not fetched")
    # A letter-digit-hyphen name or an address: what comes later reads it in one way alone.
    if not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host) or not url.isprintable():
        raise InputError(f"{where}: not a valid URL")
    name = host if port == 443 else f"{host}:{port}"
    if not any(fnmatchcase(name, pattern.lower()) for pattern in hosts):
        raise InputError(f"{where}: images from {name[:80]} are not allowed")
    return parts


def _addresses(host: str, port: int, where: str) -> list[Address]:
    """Every address of a host; all are public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
    except (OSError, ValueError):  # a name too long, an address with a zone
        raise InputError(f"{where}: the host was not found") from None
    if not addresses or not all(is_public(address) for address in addresses):
        raise InputError(f"{where}: the host has an address that is not public")
    return list(dict.fromkeys(addresses))


def _get(
    parts: SplitResult, where: str, deadline: float, max_bytes: int
) -> tuple[bytes | None, str]:
    """One request: the body, or where it redirects to."""
    host, port = (parts.hostname or "").rstrip("."), parts.port or 443
    addresses = _addresses(host, port, where)
    connection = _PinnedConnection(host, port, addresses, deadline)
    # A socket's timeout is for each wait; a server that sends a byte now and then meets this one.
    left = max(0.0, deadline - time.monotonic())
    timer = threading.Timer(left, _shut, [connection])
    timer.daemon = True
    timer.start()
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in _REDIRECTS and location:
            return None, location
        if response.status != 200:
            raise InputError(f"{where}: the host answered with status {response.status}")
        body = response.read(max_bytes + 1)
        if len(body) > max_bytes:
            raise InputError(f"{where}: the image's file is larger than {max_bytes:,} bytes")
        if time.monotonic() >= deadline or (response.length or 0) > 0:
            raise InputError(f"{where}: fetching took too long or was cut short")
        return body, ""
    except (OSError, http.client.HTTPException, ValueError):
        raise InputError(f"{where}: fetching the image failed") from None
    finally:
        timer.cancel()
        connection.close()


def _shut(connection: http.client.HTTPSConnection) -> None:
    """End whatever waits for a connection's socket."""
    try:
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # closed already
