"""How layers are measured: workloads, timing on several ranks, contenders, and result files.

`cometrt bench` and the scripts of `benchmarks/` use it. It may change with any version.
"""
