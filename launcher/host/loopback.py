"""Loopback addresses and ports."""

import ipaddress
import socket

LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Return whether only processes of this host can reach the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # 127.example.com is an ordinary host name


def find_free_port() -> int:
    """Return a port of the loopback address that nothing listens on now; another process may take it until it is used."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
