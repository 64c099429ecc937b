"""Network namespaces behind emulated carriers, for any program: Linux, root, nftables.

`topology.py` is a lab of the kernel's own NATs alone, for tests: `with Lab() as lab:`.
"""
