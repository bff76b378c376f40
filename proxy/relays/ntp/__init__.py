"""Time for workloads: servers polled on a schedule of our own, one estimate made of them, clients answered from it."""
