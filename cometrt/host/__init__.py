"""The host executor: the protocol in NumPy, two threads a rank."""

from cometrt.host.executor import HostExecutor

__all__ = ["HostExecutor"]
