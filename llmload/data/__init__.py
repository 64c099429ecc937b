"""Text and feedback that people give each other to learn from: records, their store, barter."""
