"""The host's store: one SQLite file that its processes share."""
