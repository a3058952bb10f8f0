"""The routes, one module for each protocol."""
