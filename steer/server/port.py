"""Whether an address can be listened on, asked before anything heavy is started."""

from __future__ import annotations

import socket

from steer.errors import SteerError


def check_port(host: str, port: int) -> None:
    """Raise if the port is taken or the address is not this machine's.

    Raises:
        SteerError: names address and reason.
    """
    if not 0 < port < 65536:
        raise SteerError(f"port {port} is out of range (1 to 65535)")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SteerError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --port"
        ) from None
