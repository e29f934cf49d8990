"""Measure: the floors, the small benchmark, the comparison with other file systems, and the reports of them."""
