"""The conformance table: what both HTTP hosts must make of the same bytes, from clients and from origins."""
