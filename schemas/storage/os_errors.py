"""What a file system refuses, as errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import ResourceError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EROFS, errno.EPERM}
_FAILED = {errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO}
_NO_LINKS = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def translated_os_errors(root: Path) -> Iterator[None]:
    """Turns a full or failing disk, a missing permission or feature into a ``ResourceError``."""
    try:
        yield
    except OSError as error:
        refusal = explain_os_error(error, root)
        if refusal is None:
            raise
        raise refusal from error


def explain_os_error(error: OSError, path: Path | str) -> ResourceError | None:
    """Returns what a refusal of the file system means, or None if the error is something else."""
    if error.errno in _FULL:
        advice = "the disk is full; committed shards are kept; free space and run the same command again"
    elif error.errno in _FORBIDDEN:
        advice = f"may not be read or written ({error.strerror}); check its owner and mount"
    elif error.errno in _FAILED:
        advice = (
            f"the file system failed ({error.strerror}); committed shards are kept; see to the disk or mount "
            "and run the same command again"
        )
    elif error.errno in _NO_LINKS:
        advice = "this file system has no hard links; put the stores on another one"
    else:
        return None
    return ResourceError(f"{path}: {advice}")
