"""The CPU target: `lower` rewrites graphs for it when compiling, `open_session` runs them."""

from glmcompile.targets.cpu.session import default_threads, open_session

__all__ = ["default_threads", "open_session"]
