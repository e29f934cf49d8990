"""Tell which addresses and network devices of this host anybody in the world might reach.

What is public is what IANA's registries call globally reachable (``ipaddress``). Whether a firewall stands before such
an address cannot be seen from here: whoever has one says so (``ucx.public``).
"""

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

#: ioctl(2) that asks for a device's IPv4 address (netdevice(7)), which UCX prefers over its others.
_SIOCGIFADDR = 0x8915
_IF_INET6 = Path("/proc/net/if_inet6")


def addresses_of(device: str) -> list[str]:
    """Return the addresses at which UCX may listen on a device: its IPv4 address, or without one those of IPv6."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", device.encode()[:15]))
        except OSError:
            pass
        else:
            return [socket.inet_ntoa(answer[20:24])]
    if not _IF_INET6.exists():
        return []
    rows = (line.split() for line in _IF_INET6.read_text().splitlines())
    return [str(ipaddress.IPv6Address(bytes.fromhex(row[0]))) for row in rows if row[-1] == device]


def is_public(address: str) -> bool:
    """Tell whether an address is of the public internet; that of all devices (``0.0.0.0``) is if one of theirs is."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.is_unspecified:
        return bool(public_devices(name for _, name in socket.if_nameindex()))
    return parsed.is_global


def public_devices(devices: Iterable[str]) -> dict[str, str]:
    """Return those of some network devices that have a public address, with that address."""
    found = {device: [one for one in addresses_of(device) if is_public(one)] for device in devices}
    return {device: public[0] for device, public in found.items() if public}
