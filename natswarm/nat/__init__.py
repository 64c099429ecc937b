"""What a NAT does, and how to find out."""
