"""Remote images: named hosts, public addresses, bounded time and size; against a TLS server."""

from __future__ import annotations

import http.server
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glmcompile.errors import InputError
from glmcompile.runtime import fetch as module
from glmcompile.runtime.fetch import MAX_REDIRECTS, fetch, is_public

HOST = "images.test"
LOOPBACK = "127.0.0.1"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].strip("/").split("/")[0]
        if name == "image":
            self.reply(200, self.headers["Host"].encode() + self.path.encode())
        elif name == "large":
            self.reply(200, bytes(5000))
        elif name == "redirect":
            target = self.path.removeprefix("/redirect/")
            self.reply(302, b"", Location=target)
        elif name == "loop":
            self.reply(302, b"", Location="/loop")
        elif name == "short":
            self.reply(200, b"abc", **{"Content-Length": "100"})
        elif name == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        elif name == "slow_headers":
            for _ in range(100):
                self.wfile.write(b"H")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.reply(404, b"")

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are what is tested


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate of images.test."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}",
         "-keyout", str(file), "-out", str(file.with_suffix(".crt"))],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


@pytest.fixture(scope="module")
def port(certificate: Path) -> Iterator[int]:
    server = Server((LOOPBACK, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Sets the answers that the name server gives, one look-up each; the last stays."""

    def set_answers(*answers: list[str]) -> list[str]:
        left, asked = list(answers), []

        def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            found = left.pop(0) if len(left) > 1 else left[0]
            return [(2, 1, 6, "", (address, port)) for address in found]

        monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
        return asked

    return set_answers


@pytest.fixture
def web(
    port: int,
    certificate: Path,
    resolve: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., bytes]:
    """Fetches from the test's server as if its address were public and its certificate known."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(timeout)
        connection.connect((LOOPBACK, address[1]))
        return connection

    monkeypatch.setattr(module.socket, "create_connection", connect)
    resolve(["8.8.8.8"])

    def get(path: str, timeout: float = 5.0, most: int = 4000) -> bytes:
        url = f"https://{HOST}:{port}/{path}"
        return fetch(url, "images[0]", [f"{HOST}:{port}"], timeout, most)

    return get


def test_an_allowed_host_is_fetched(web: Callable[..., bytes], port: int) -> None:
    assert web("image/a.png?x=1") == f"{HOST}:{port}/image/a.png?x=1".encode()
    assert web("redirect//image") == f"{HOST}:{port}/image".encode()


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing", "status 404"),
        ("large", "larger than 4,000 bytes"),
        ("loop", f"more than {MAX_REDIRECTS} redirects"),
        ("short", "cut short|failed"),
        ("redirect/http://images.test/image", "only https"),
        ("redirect/https://other.test/image", "images from other.test are not allowed"),
        ("redirect/file:///etc/passwd", "only https"),
        ("redirect/https://[", "no valid URL|not a valid URL"),
        ("image/\r\nX: y", "not a valid URL|failed"),
    ],
)
def test_what_goes_wrong_is_an_input_error(
    web: Callable[..., bytes], path: str, complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint) as raised:
        web(path)
    assert str(raised.value).startswith("images[0]: ")


@pytest.mark.parametrize("path", ["drip", "slow_headers"])
def test_a_dripping_server_meets_the_deadline(web: Callable[..., bytes], path: str) -> None:
    with pytest.raises(InputError, match=r"too long|failed"):
        web(path, timeout=0.5)


def test_the_certificate_is_checked(
    web: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputError, match="fetching the image failed"):
        web("image")


def test_redirects_are_judged_by_their_own_addresses(
    web: Callable[..., bytes], resolve: Callable[..., list[str]]
) -> None:
    asked = resolve(["8.8.8.8"], ["10.0.0.1"])
    with pytest.raises(InputError, match="not public"):
        web("redirect//image")
    assert asked == [HOST, HOST]


def test_the_judged_address_is_the_connections(
    resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers otherwise the second time (DNS rebinding) is not asked again."""
    asked = resolve(["1.1.1.1", "2606:4700::1111"], ["127.0.0.1"])
    tried: list[Any] = []

    def refuse(address: Any, timeout: float) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(module.socket, "create_connection", refuse)
    with pytest.raises(InputError, match="fetching the image failed"):
        fetch("https://a.test/x", "images[0]", ["*.test"], 5.0, 100)
    assert asked == ["a.test"]
    assert tried == [("1.1.1.1", 443), ("2606:4700::1111", 443)]


INSIDE = [
    "127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
    "100.64.0.1", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1", "198.18.0.1",
    "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::808:808",
    "2002:7f00:1::1", "::127.0.0.1", "2001:0:808:808::1",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside_are_refused(
    resolve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    def connect(*arguments: Any) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(module.socket, "create_connection", connect)
    for answer in ([address], ["8.8.8.8", address]):
        resolve(answer)
        with pytest.raises(InputError, match="an address that is not public"):
            fetch("https://a.test/x.png", "images[0]", ["*"], 5.0, 100)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("https://evil.test/x", "images from evil.test are not allowed"),
        ("https://images.test.evil.test/x", "are not allowed"),
        ("https://images.test@evil.test/x", "user name"),
        ("https://evil.test\\@images.test/x", "user name|not a valid URL|not allowed"),
        ("https://images.test:8443/x", "images from images.test:8443 are not allowed"),
        ("http://images.test/x", "only https"),
        ("https:///x", "not a valid URL"),
        ("https://images.test:port/x", "not a valid URL"),
        ("https://[::1/x", "not a valid URL"),
        ("https://[fe80::1%25eth0]/x", "not a valid URL"),
        ("https://ımages.test/x", "not a valid URL"),
        ("https://" + "a" * 10_000 + ".test/", "are not allowed"),
    ],
)
def test_other_hosts_are_not_even_looked_up(
    resolve: Callable[..., list[str]], url: str, complaint: str
) -> None:
    asked = resolve(["8.8.8.8"])
    with pytest.raises(InputError, match=complaint) as raised:
        fetch(url, "images[0]", ["images.test"], 5.0, 100)
    assert asked == []
    assert len(str(raised.value)) < 200


def test_without_patterns_nothing_is_fetched() -> None:
    with pytest.raises(InputError, match="images are not fetched"):
        fetch("https://images.test/x", "images[0]", [], 5.0, 100)


def test_hosts_match_in_any_case_and_with_a_last_dot(resolve: Callable[..., list[str]]) -> None:
    asked = resolve(["10.0.0.1"])
    with pytest.raises(InputError, match="not public"):
        fetch("HTTPS://Images.TEST./x", "images[0]", ["IMAGES.test"], 5.0, 100)
    assert asked == [HOST]
