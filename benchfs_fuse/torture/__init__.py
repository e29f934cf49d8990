"""Torture a cluster: many workers, faults aimed at them, and a manifest of all that was acknowledged."""
