"""Show where time goes: what is always counted, what is recorded while somebody asks for it, and what that says."""
