"""Tell public addresses of the internet from all others.

An address is public only where this file says so: IPv4 outside the special-purpose ranges, and IPv6
inside the one range that is assigned to hosts (2000::/3), less what carries an IPv4 address in it.

Source: IANA, IPv4 and IPv6 Special-Purpose Address Registries; RFC 6052 (NAT64), RFC 3056 (6to4),
RFC 4380 (Teredo), RFC 5214 (ISATAP). The standard library's `is_global` changed between patch
versions of Python, and knows nothing of what a cloud puts at a public address.
"""

from __future__ import annotations

from ipaddress import (
    AddressValueError,
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
)

__all__ = ["is_public", "parse_address"]

IPV4_NOT_PUBLIC = tuple(
    IPv4Network(one)
    for one in (
        "0.0.0.0/8",  # this network; 0.0.0.0 dials this machine
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by customers of one provider (CGNAT); Alibaba's metadata
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # multicast tunnels (AMT)
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; broadcast
        "168.63.129.16/32",  # Azure's WireServer: metadata at an address of a public range
    )
)
IPV6_PUBLIC = IPv6Network("2000::/3")
IPV6_NOT_PUBLIC = tuple(
    IPv6Network(one)
    for one in (
        "2001::/23",  # protocol assignments; Teredo, which carries an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which carries an IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
ISATAP = (0x00005EFE, 0x02005EFE)  # third group of 32 bits; the fourth is an IPv4 address


def parse_address(text: str) -> IPv4Address | IPv6Address | None:
    """Parse an address in its one plain form: four decimal numbers, or IPv6 without a zone."""
    try:
        return IPv4Address(text)  # refuses leading zeros, hexadecimal and short forms
    except AddressValueError:
        pass
    try:
        return None if "%" in text else IPv6Address(text)
    except AddressValueError:
        return None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address belongs to a host on the public internet."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in IPV4_NOT_PUBLIC)
    if address.scope_id is not None or address not in IPV6_PUBLIC:
        return False  # also IPv4-mapped (::ffff:0:0/96), NAT64 (64:ff9b::/96), private, link-local
    if (int(address) >> 32) & 0xFFFFFFFF in ISATAP:
        return False
    return not any(address in network for network in IPV6_NOT_PUBLIC)
