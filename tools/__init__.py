"""What developers run: the laboratory, benchmarks, the script that trained the small model."""
