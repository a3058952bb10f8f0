"""Where engines run: each target lowers graphs for its device and opens sessions on it."""
