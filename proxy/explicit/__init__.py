"""The explicit proxy: who asks, by which credentials, and for what."""
