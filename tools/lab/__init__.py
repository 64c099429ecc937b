"""Pairs of devices behind the kernel's NATs that write a text together; README.md says how.

The laboratory itself is `natswarm.lab`.
"""
