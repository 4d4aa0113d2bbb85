"""The executor on "host": the protocol in NumPy, with two threads per rank."""

from cometrt.host.executor import HostExecutor

__all__ = ["HostExecutor"]
