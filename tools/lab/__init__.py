"""A laboratory of network namespaces with the kernel's own NAT: Linux, root, nftables.

`with Lab() as lab:` in `topology.py` is the way in; README.md draws it.
"""
