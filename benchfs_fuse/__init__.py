"""BenchFS-FUSE: an ad-hoc distributed file system that anyone can mount.

Storage daemons over directories that are already there, mounted through FUSE, carried by UCX and io_uring.
"""

__version__ = "0.1.0"
