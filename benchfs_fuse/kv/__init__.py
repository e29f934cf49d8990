"""Implement the key-value port: RocksDB, and a dictionary for tests."""
