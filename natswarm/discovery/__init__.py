"""Finding peers without servers. Pure: what is said, not who carries it."""
