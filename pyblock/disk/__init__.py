"""What a disk is, without time."""
