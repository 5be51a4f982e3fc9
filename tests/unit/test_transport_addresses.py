"""Where a transport may listen, and which addresses it takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from transports.addresses import Site, check_endpoint, close_if_connected, is_v6, parse_listen
from transports.base import AddressError


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("ipc", None),
        ("tcp://127.0.0.1", ("127.0.0.1", 0)),
        ("tcp://127.0.0.1:7001", ("127.0.0.1", 7001)),
        ("tcp://10.1.2.3", ("10.1.2.3", 0)),
        ("tcp://[::1]", ("[::1]", 0)),
        ("tcp://[::1]:65535", ("[::1]", 65535)),
    ],
)
def test_a_listen_address_is_ipc_or_a_literal_with_perhaps_a_port(
    listen: str, expected: tuple[str, int] | None
) -> None:
    assert parse_listen(listen, wildcard=False) == expected


@pytest.mark.parametrize("listen", ["tcp://*", "tcp://0.0.0.0", "tcp://0.0.0.0:7001", "tcp://[::]"])
def test_every_interface_must_be_allowed(listen: str) -> None:
    with pytest.raises(AddressError, match="every interface"):
        parse_listen(listen, wildcard=False)
    parsed = parse_listen(listen, wildcard=True)
    assert parsed is not None and parsed[0] in ("0.0.0.0", "[::]")


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "tcp://",
        "tcp://localhost",
        "tcp://eth0",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:x",
        "tcp://::1",
        "ipc:///x",
    ],
)
def test_any_other_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(AddressError):
        parse_listen(listen, wildcard=True)


@pytest.mark.parametrize(
    "address", ["ipc:///run/x/a.d", "tcp://127.0.0.1:1", "tcp://[fe80::1%eth0]:80", "tcp://host-1.lan:9"]
)
def test_a_full_address_can_be_connected_to(address: str) -> None:
    assert check_endpoint(address) == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ipc://relative",
        "ipc://@abstract",
        "ipc:///line\nbreak",
        f"ipc:///{'x' * 107}",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:65536",
        "tcp://*:5",
        "tcp://a b:5",
        "tcp://127.0.0.1:5;tcp://127.0.0.1:6",
        "udp://127.0.0.1:5",
        f"tcp://{'h' * 300}:5",
    ],
)
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    with pytest.raises(AddressError):
        check_endpoint(address)


def test_only_a_bracketed_host_is_v6() -> None:
    assert is_v6("tcp://[::1]:5")
    assert not is_v6("tcp://127.0.0.1:5")
    assert not is_v6("ipc:///[x]")


def test_a_missing_directory_is_made_for_this_user_alone(runtime_directory: Path) -> None:
    site = Site.choose("ipc", runtime_directory / "deep" / "er", "name", wildcard=False)
    directory = site.files[0].parent
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len({*site.files}) == 3
    site.clear()
    assert directory.exists()


def test_names_do_not_appear_in_paths_and_never_collide(runtime_directory: Path) -> None:
    sites = [Site.choose("ipc", runtime_directory / "s", "../../" + "x" * 300, wildcard=False) for _ in range(2)]
    assert sites[0].addresses != sites[1].addresses
    assert "x" * 5 not in sites[0].addresses.data


def test_without_a_directory_one_is_made_and_removed() -> None:
    site = Site.choose("ipc", None, "name", wildcard=False)
    directory = site.files[0].parent
    assert directory.stat().st_mode & 0o777 == 0o700
    site.files[0].touch()
    site.clear()
    assert not directory.exists()


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o755, 0o777])
def test_a_directory_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(AddressError, match="0700"):
        Site.choose("ipc", directory, "name", wildcard=False)


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(AddressError, match="link"):
        Site.choose("ipc", tmp_path / "link", "name", wildcard=False)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AddressError, match="no directory"):
        Site.choose("ipc", tmp_path / "file", "name", wildcard=False)


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(AddressError, match="another user"):
        Site.choose("ipc", directory, "name", wildcard=False)


def test_f64_a_path_that_is_too_long_for_a_socket_is_refused_before_anything_is_bound(tmp_path: Path) -> None:
    with pytest.raises(AddressError, match="too long"):
        Site.choose("ipc", tmp_path / ("x" * 100), "name", wildcard=False)


def test_a_descriptor_is_closed_only_if_its_socket_is_at_one_of_the_addresses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        address = "tcp://{}:{}".format(*server.getsockname())
        descriptors = [os.dup(one.fileno()) for one in (server, client, accepted)]
        accepted.close()
        for descriptor in descriptors:
            close_if_connected(descriptor, {"tcp://127.0.0.1:1", "ipc:///elsewhere"})
            os.fstat(descriptor)
            close_if_connected(descriptor, {address})
            with pytest.raises(OSError, match="descriptor"):
                os.fstat(descriptor)
        read, write = os.pipe()
        for descriptor in (read, write):
            close_if_connected(descriptor, {address})
            os.close(descriptor)
            close_if_connected(descriptor, {address})


def test_importing_the_transports_loads_no_zmq() -> None:
    code = "import sys, transports; assert not any(name.split('.')[0] == 'zmq' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, cwd=Path(__file__).parents[2])
