"""A machine that exists in memory only, and one whose memory is a file."""
