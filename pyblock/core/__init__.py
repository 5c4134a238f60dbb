"""Integers to names, addresses and IDs, and the block index: what is done in C."""
