"""One device of the lab: serves blocks of the small model and tells all it does as JSON lines.

    python -m tools.lab.device --name a --blocks 0-2 --join natswarm:... --seed 7

What `llmload up --json` does, with the punctures told as `natswarm up --json` tells them, and
with an identity and a node that draw from a seed.
"""

from __future__ import annotations

import argparse
import hashlib

import trio

from llmload.model_folder import load_model
from llmload.swarm.blocks import BlockStack
from llmload.swarm.route import parse_blocks
from llmload.swarm.stage import StageServer
from llmload.weights import bundled_model_path
from natswarm import Identity, Invite, NodeConfig, SystemPaths, open_node
from natswarm.cli.options import print_json
from natswarm.cli.show import event_as_json

__all__ = ["main"]


async def serve(name: str, blocks: range, invite: Invite, seed: int) -> None:
    """Join by `invite` and serve `blocks` until killed."""
    model = load_model(bundled_model_path(), blocks)
    stack = BlockStack.open(model.config, model.weights, blocks)
    config = NodeConfig(
        identity=Identity(hashlib.sha256(f"lab/{seed}/{name}".encode()).digest()),
        name=name,
        seed=seed,
        paths=SystemPaths(),
        on_event=lambda event: print_json(event_as_json(event)),
    )
    async with open_node(config) as node:
        server = StageServer(node, stack, model.content_hash)
        server.start()
        await node.connect(invite)
        await node.inspect()
        await node.announce([server.service])
        print_json({"event": "serving", "peer_id": str(node.peer_id), "service": server.service})
        await trio.sleep_forever()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--name", required=True)
    parser.add_argument("--blocks", type=parse_blocks, required=True)
    parser.add_argument("--join", type=Invite.parse, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    trio.run(serve, arguments.name, arguments.blocks, arguments.join, arguments.seed)


if __name__ == "__main__":
    main()
