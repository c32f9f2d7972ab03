"""Variables of the transports between devices (NCCL, HCCL): by default they listen on an interface of their own choice."""

import fcntl
import os
import socket
import struct

_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15


def bind_device_transports(device: str, address: str) -> None:
    """Have the transports that a rank on `device` opens listen on `address` only. A user's own setting stays.

    Also turns off NCCL's diagnostic listener, and PyTorch's watchdog, which would abort the process: tandem watches the peers itself.
    """
    if device == "cpu":
        return
    interface = _find_interface(address)
    found = {
        "NCCL_SOCKET_IFNAME": None if interface is None else f"={interface}",  # "=": this name, not a prefix
        "HCCL_SOCKET_IFNAME": None if interface is None else f"={interface}",
        "HCCL_IF_IP": address if ":" not in address else None,
        "NCCL_RAS_ENABLE": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
    }
    for name, value in found.items():
        if value is not None:
            os.environ.setdefault(name, value)


def _find_interface(address: str) -> str | None:
    """Return the name of the network interface with an IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
