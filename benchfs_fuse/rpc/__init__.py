"""Carry requests between processes: messages, frames, the meeting socket, UCX."""
