"""The node of a device: opened from a state folder, and asked by its user's other commands.

| module | what is in it |
|---|---|
| config.py | how to open the node of a folder |
| answers.py | running it, and what it answers |
| facts.py | a node and its peers as JSON |
"""

from __future__ import annotations

from natswarm.device.answers import open_device
from natswarm.device.config import DhtOptions, device_config

__all__ = ["DhtOptions", "device_config", "open_device"]
