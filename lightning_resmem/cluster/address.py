"""Addresses of clusters: what is one, and whether something listens there. Knows nothing of Ray."""

import socket

from lightning_resmem.errors import InputError, first_line

# How long a cluster may take to accept a connection.
_CONNECT_SECONDS = 5.0


def check_address(address: str | None) -> None:
    """Refuse what is no address of a cluster, or one that cannot be used."""
    if address is not None and (not isinstance(address, str) or not address):
        raise InputError(f"address={address!r}: give HOST:PORT of a Ray cluster, or None.")
    if address is not None and address.startswith("ray://"):
        raise InputError(
            f"address={address!r} is one of Ray Client, which cannot share actors with other processes: run the script "
            "on a node of the cluster (`ray job submit`), with its address HOST:6379 or none."
        )


def check_answers(address: str | None) -> None:
    """Raise an error if it is a `HOST:PORT` where nothing listens."""
    if address is None or "://" in address or ":" not in address:  # "auto", say
        return
    try:
        knock(address)
    except (OSError, OverflowError, ValueError) as error:  # no answer, or a port that there cannot be
        raise no_cluster(address, error) from error


def knock(address: str) -> None:
    """Raise an OSError if nothing listens at `HOST:PORT`: Ray would try to join it for more than a minute."""
    host, port = host_and_port(address)
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def no_cluster(address: str, error: Exception) -> InputError:
    """The error for an address where no cluster can be joined."""
    return InputError(
        f"address={address!r}: no Ray cluster can be joined there ({first_line(error)}). Start one with `ray start "
        "--head --port=6379`, and export RAY_AUTH_MODE=token before Python starts if it wants tokens."
    )


def host_and_port(address: str) -> tuple[str, str]:
    """The two parts of an address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port
