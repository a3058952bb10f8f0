"""Where engines run: each target is one file that lowers a graph for a device and opens a session."""
