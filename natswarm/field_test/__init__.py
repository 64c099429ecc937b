"""Field tests: punctures between two real carriers, again and again, every result with its reason.

| file | idea |
|---|---|
| plan.py | a plan file, and the slots it makes |
| records.py | the lines of a journal |
| journal.py | append-only, synced, resumed |
| session.py | begins or resumes: the journal decides what was agreed |
| privacy.py | what of an address is written down |
| carrier.py | what to call a carrier |
| link.py | is an interface usable, does it stand, what has it sent? |
| stall.py, traffic.py | what silently stopped sending |
| side.py | one side of one attempt: a node with new ports, watched |
| attempt.py | one attempt, from its start to its record |
| quality.py | round trips, loss and bandwidth of a new path |
| schedule.py | carries out a plan, waits, tries again |
| local.py | both sides on one laptop |
| remote.py, board.py | the sides on two devices, which agree through their helpers |
| tally.py | from journals to numbers |
| page.py, chart.py, picture.py | from numbers to a page, a CSV and a PNG |

`cli/field_test.py` puts them together. field-tests/README.md is for who runs one.
"""
