"""Prove a file system from outside: these tools need only directories and know nothing of what is mounted there."""
