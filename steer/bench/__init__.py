"""Benchmarks: ratios of things run in turn in one process. `steer bench NAME` runs one."""
