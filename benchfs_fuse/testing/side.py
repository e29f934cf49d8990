"""The process of one side of a `Pair`: serves the connection whose file descriptor is its argument."""

import sys
from multiprocessing.connection import Connection

from benchfs_fuse.testing.sides import serve

if __name__ == "__main__":
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)
