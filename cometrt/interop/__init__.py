"""Layers inside other libraries' programs: `cometrt.interop.jax`."""
