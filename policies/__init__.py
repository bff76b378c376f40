"""The policy core: a document becomes a `Policy`, an attempt gets a `Verdict`. No sockets, no clock, no files."""
