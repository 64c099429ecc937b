"""An HTTP API for existing programs, over a model here or in the swarm."""
