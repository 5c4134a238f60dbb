"""The original's JSON: its schema, the translation, the file. Import and export, and nothing
else."""
