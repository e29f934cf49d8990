"""Know the libraries of our own that are built with the package where there is a compiler (setup.py)."""

import ctypes
import hashlib
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """Name a library, by the beginning of its file name, and its source beside it."""

    directory: Path
    name: str
    source: str

    def find(self) -> Path | None:
        """Return where the library is, None where it was not built for this Python."""
        found = (self.directory / f"{self.name}{suffix}" for suffix in EXTENSION_SUFFIXES)
        return next((path for path in found if path.exists()), None)

    def is_current(self, library: Path) -> bool:
        """Tell whether a library was built from the source beside it: another one has other structures."""
        try:
            built_from = (ctypes.c_char * 65).in_dll(ctypes.CDLL(str(library)), "benchfs_source").value
        except (OSError, ValueError):  # what cannot be loaded; what has no such name
            return False
        return built_from.decode() == hashlib.sha256((self.directory / self.source).read_bytes()).hexdigest()

    def usable(self) -> Path | None:
        """Return where the library is; None, with a warning if need be, where there is none of this version."""
        library = self.find()
        if library is not None and not self.is_current(library):
            log.warning("%s was built from another version and is left out: install the package again", library)
            return None
        return library
