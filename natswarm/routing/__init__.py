"""Routing without servers: Kademlia's geometry, walked hop by hop over living connections.

distance.py ids and XOR; kbucket.py and table.py whom we know; protocol.py what is said; router.py
one request on its way; lookup.py the request seen from its origin; record.py and store.py what is
published; meeting.py introductions over several hops; upkeep.py which links to make; overlay.py all
of them as one machine. docs/routing.md tells the whole story.
"""
