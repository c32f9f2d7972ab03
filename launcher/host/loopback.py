"""Detection of loopback addresses."""

import ipaddress


def is_loopback(address: str) -> bool:
    """Return whether only processes of this host can reach the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # 127.example.com is an ordinary host name
