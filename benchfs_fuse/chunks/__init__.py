"""Keep chunks of file data on disk through io_uring."""
