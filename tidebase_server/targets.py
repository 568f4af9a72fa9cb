"""The addresses that webhooks may be sent to.

Whoever may create a run chooses where its webhooks go, and can read what the receiver answered. So a server that others
can reach must not give them a way into its own machine and its private networks.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
HOST_NAME = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")

# Where clouds answer with the machine's own credentials. The most common one, 169.254.169.254, is link-local.
METADATA = tuple(map(ipaddress.ip_network, (
    "fd00:ec2::/32",       # AWS
    "fd20:ce::254/128",    # Google
    "100.100.100.200/32",  # Alibaba
    "168.63.129.16/32",    # Azure
)))
# IPv6 networks whose addresses stand for the IPv4 address in their last 32 bits (RFC 6052, 8215, 7915, 4291).
TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96")))
# Not routed in the open internet, though the ipaddress module of Python 3.11 takes them for global: translation to
# IPv4 within a network (RFC 8215), with the IPv4 address anywhere in it, and segment routing (RFC 9602).
INTERNAL = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "5f00::/16")))


class WebhookTargets:
    """Decides which addresses a webhook may be sent to."""

    def __init__(self, allowed: str, on_loopback: bool) -> None:
        """
        :param allowed: TIDEBASE_WEBHOOK_ALLOW, host names and networks with commas between them.
        :param on_loopback: the server listens on loopback. Whoever can use it is on this machine, and reaches its
            networks anyway.
        :raises ValueError: an item is neither a host name nor a network; the message says which.
        """
        self.on_loopback = on_loopback
        self.hosts: set[str] = set()
        self.networks: list[Network] = []
        for item in filter(None, (item.strip() for item in allowed.split(","))):
            try:
                self.networks.append(ipaddress.ip_network(item.strip("[]")))
            except ValueError:
                if not HOST_NAME.fullmatch(item):
                    raise ValueError(f"{item[:100]!r} is no host name and no network like 10.1.0.0/16") from None
                self.hosts.add(item.rstrip(".").lower())

    def refusal(self, host: str, address: str) -> str | None:
        """Why no webhook may be sent to this address, in words for a person; None when one may.

        :param host: the host as written in the URL.
        :param address: the address that it was resolved to, and that will be connected to.
        """
        where = host if host == address else f"{host} ({address})"
        for form in _forms(ipaddress.ip_address(address)):
            if kind := _never(form):
                return f"{where} is {kind}: no webhook is sent there"
            if (kind := _inside(form)) and not self._is_allowed(host, form):
                return (f"{where} is {kind}: not allowed while the server listens beyond loopback; "
                        "see TIDEBASE_WEBHOOK_ALLOW")
        return None

    def _is_allowed(self, host: str, address: Address) -> bool:
        return (self.on_loopback or host.rstrip(".").lower() in self.hosts
                or any(address in network for network in self.networks))


def _forms(address: Address) -> Iterator[Address]:
    """The address, and each IPv4 address that it stands for in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            yield address.ipv4_mapped  # the same address; it is in no IPv6 network
            return
        number = int(address)
        if number > 1 and any(address in network for network in TRANSLATED):
            yield ipaddress.IPv4Address(number & 0xFFFF_FFFF)
        if address.sixtofour:
            yield address.sixtofour
        if address.teredo:
            yield from address.teredo
    yield address


def _never(address: Address) -> str | None:
    """What an address is, in words, when no webhook may be sent to it, whatever the settings; else None."""
    if address.is_unspecified or (address.version == 4 and int(address) < 1 << 24):
        return "no address of a host"
    if address.is_link_local:
        return "a link-local address"
    if any(address in network for network in METADATA):
        return "the metadata service of a cloud"
    if address.is_multicast or (address.version == 4 and address.is_reserved):
        return "a multicast or reserved address"
    return None


def _inside(address: Address) -> str | None:
    """What an address is, in words, when it cannot be reached from the open internet; else None."""
    if address.is_loopback:
        return "this machine"
    if (not address.is_global or any(address in network for network in INTERNAL)
            or (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)):
        return "in a private network"
    return None
