"""One model over several peers: each serves some of its blocks, a client sends prompts through."""
