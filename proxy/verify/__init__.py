"""`outgate verify`: what a workload can reach from where it stands, beside what its policy says it may."""
