"""Making a path between two peers that no NAT would let meet by itself."""
