"""An HTTP API for existing programs, and a page to chat, over a model here or in the swarm."""
