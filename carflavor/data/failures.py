"""Whose fault it is that a photo cannot be read: its own, or that of the drive or the network that it lies on."""

import errno

# Of drives that are gone, and of what this machine is short of. A file that is missing, forbidden or none has others.
_PASSING_NAMES = (
    *("EIO", "EREMOTEIO", "ESTALE", "ENODEV", "ENXIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH"),
    *("ENETDOWN", "ENETUNREACH", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EMFILE", "ENFILE", "ENOMEM"),
)
_PASSING = {getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)}  # not every system has all


class UnreachableError(OSError):
    """What a photo lies on cannot be read for now. It ends the step: nothing is wrong with the photo."""


def unreachable(what, reason):
    """Returns the `UnreachableError` for a file, with its sentence."""
    return UnreachableError(f"{what} cannot be read for now: {reason}; the same command goes on where it was")


def raise_if_unreachable(what, error):
    """Raises `UnreachableError` if an error tells of the drive that a file lies on, or of this machine.

    Args:
        what: What messages call the file.
        error: Any exception. One that is an `UnreachableError` already is raised as it is.
    """
    if isinstance(error, UnreachableError):
        raise error
    if getattr(error, "errno", None) in _PASSING:
        raise unreachable(what, getattr(error, "strerror", None) or error) from None
