"""Give the file system its meaning over the ports: knows no FUSE, no UCX, no disk."""
