"""Learning over peers: a local trainer, gradients cut into shards, and rounds that average them."""
