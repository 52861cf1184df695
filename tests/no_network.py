"""Forbid a process the network, native libraries included (Linux: a filter of system calls).

Used as a program: `python tests/no_network.py REACH program arguments…`. The first call that is
forbidden ends the process with SIGSYS. Its children inherit the filter. Reach "nothing" has no
internet socket at all; "loopback" has sockets that listen, and none that calls.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

SOCKET, CONNECT, SENDMMSG = {"x86_64": (41, 42, 307), "aarch64": (198, 203, 269)}.get(
    platform.machine(), (0, 0, 0)
)
CAN_FORBID = sys.platform == "linux" and SOCKET > 0
AF_INET, AF_INET6 = 2, 10
LOAD, IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER, FIRST_ARGUMENT = 0, 16  # where a system call's facts are
ALLOW, KILL = 0x7FFF0000, 0x80000000
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2

NOTHING = [
    (LOAD, 0, 0, NUMBER),
    (IF_EQUAL, 0, 4, SOCKET),  # else over the next four
    (LOAD, 0, 0, FIRST_ARGUMENT),
    (IF_EQUAL, 1, 0, AF_INET),
    (IF_EQUAL, 0, 1, AF_INET6),
    (RETURN, 0, 0, KILL),
    (RETURN, 0, 0, ALLOW),
]
LOOPBACK = [
    (LOAD, 0, 0, NUMBER),
    (IF_EQUAL, 1, 0, CONNECT),
    (IF_EQUAL, 0, 1, SENDMMSG),  # what a look-up of a name sends by
    (RETURN, 0, 0, KILL),
    (RETURN, 0, 0, ALLOW),
]


def forbid(rules: list[tuple[int, int, int, int]]) -> None:
    """Filter the system calls of this process from now on."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (NO_NEW_PRIVILEGES, 1, 0, 0, 0),
        (SET_SECCOMP, FILTER, ctypes.c_void_p(ctypes.addressof(program)), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid({"nothing": NOTHING, "loopback": LOOPBACK}[sys.argv[1]])
    os.execv(sys.argv[2], sys.argv[2:])
