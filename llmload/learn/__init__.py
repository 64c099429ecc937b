"""Learning on this device and over peers: trainer, shards, outer loop, exchange, checkpoints."""
