"""`torchbandit bench`: what the package costs, beside its peers and the hardware's limits.

`frame` measures, asserts and prints; `peers` says how others are set up; each other file is one benchmark, a function
`Frame -> None` that adds lines. docs/benchmarks.md tells how to read one.
"""
