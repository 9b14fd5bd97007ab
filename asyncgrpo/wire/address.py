"""Addresses of this machine, as others see them."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # netdevice(7)
IFREQ, ADDRESS_AT = "256s", 20


def own_address(host: str, port: int) -> str:
    """This machine's IPv4 address on the way to another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def device_of(address: str) -> str:
    """The network device with an IPv4 address. OSError when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack(IFREQ, name.encode())
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # a device without an address
                continue
            if socket.inet_ntoa(answer[ADDRESS_AT : ADDRESS_AT + 4]) == address:
                return name
    raise OSError(f"no network device has the address {address}")
