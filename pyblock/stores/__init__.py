"""Where state lives. So far: a JSON file."""
