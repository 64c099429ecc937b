"""Trio drivers: the only package that touches sockets, the clock and the operating system."""
