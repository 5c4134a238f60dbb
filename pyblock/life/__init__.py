"""How a disk comes, goes, and is found again."""
