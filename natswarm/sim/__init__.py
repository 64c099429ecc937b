"""A virtual internet in one process: hosts, links and NATs on a heap of events.

Pure and seeded: the same seed gives the same run, event for event. `natswarm/net/virtual.py` puts
whole nodes on it; statistics over thousands of punctures use it bare.
"""
