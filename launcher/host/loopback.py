"""Which addresses only processes of this host can reach."""

import ipaddress


def is_loopback(address: str) -> bool:
    """Whether only processes of this host can reach the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # 127.example.com is a name like any other
