"""Make a file hang whoever reads it, as a network file system does whose server is away."""

import contextlib
import os
from pathlib import Path
from typing import Self


class Hung:
    """Put a FIFO in place of a file: whoever opens it waits until ``recover``, then finds nothing. Ends in that."""

    def __init__(self, file: Path) -> None:
        self._file, self._fifo = file, file.with_name("fifo")
        os.mkfifo(self._fifo)
        os.link(self._fifo, file.with_name("hung"))
        file.with_name("hung").rename(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.recover()

    def recover(self) -> None:
        """Let everybody go; the file is gone."""
        if self._fifo.exists():
            self._file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # nobody reads
                os.close(os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK))
            self._fifo.unlink()
