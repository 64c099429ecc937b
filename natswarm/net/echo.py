"""Echoes: tell others what we see of them, and find out what they see of us.

The answering half does for peers what STUN servers did, within limits: one answer for one request,
never longer than it; to where the request came from, or to an address that the asker has shown that
it receives at (`nat/address_token.py`); and only so many a second, for all together, for each
prefix and for each address, so that a flood from one network leaves the others theirs. The asking
half is an inspection (`net/inspection.py`).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence

import trio

from natswarm.address import Endpoint
from natswarm.identity import Identity
from natswarm.nat.address_token import AddressTokens
from natswarm.nat.classify import Observation
from natswarm.nat.findings import Findings, NatTest
from natswarm.nat.inspection import QUICK, NatInspection
from natswarm.nat.measurement import Observer
from natswarm.nat.votes import prefix_of
from natswarm.net.budget import Budget, KeyedBudget
from natswarm.net.inspection import AskNeighbour, InspectionDriver
from natswarm.net.port import DatagramPort, Network
from natswarm.swarm_key import OPEN_SWARM, SwarmKey
from natswarm.wire import NO_TOKEN, EchoReply, EchoRequest, decode_echo_request_untrusted

__all__ = ["AskNeighbour", "EchoService"]

# An inspection asks up to 100 times a second, from one address. Each request costs a
# signature and a verification, 0.15 ms together: at most 6 % of a core.
ECHOES_PER_S = 400.0
ECHOES_PER_ADDRESS_PER_S = 120.0
# One inspection and a bit: whoever has many addresses in one network has one prefix.
ECHOES_PER_PREFIX_PER_S = 160.0

# Replies to somebody we never heard from, on the word of a neighbour: four for each newcomer.
UNSOLICITED_ECHOES_PER_S = 20.0
UNSOLICITED_ECHOES_PER_PREFIX_PER_S = 10.0


class EchoService:
    """Both halves, for one node.

    Args:
        identity: Signs requests and replies.
        network: Where the fresh ports of an inspection come from.
        bind_ip: The address they are bound to.
        main_port: The node's port p.
        alternate_port: Its port q.
        swarm: Whose key seals echoes; what comes in is opened by the caller.
    """

    def __init__(
        self,
        identity: Identity,
        network: Network,
        bind_ip: str,
        main_port: DatagramPort,
        alternate_port: DatagramPort,
        swarm: SwarmKey = OPEN_SWARM,
    ) -> None:
        self._identity = identity
        self._network = network
        self._bind_ip = bind_ip
        self._main_port = main_port
        self._alternate_port = alternate_port
        self._swarm = swarm
        self._budget = Budget(per_s=ECHOES_PER_S)
        self._address_budgets = KeyedBudget(per_s=ECHOES_PER_ADDRESS_PER_S)
        self._prefix_budgets = KeyedBudget(per_s=ECHOES_PER_PREFIX_PER_S)
        self._unsolicited_budget = Budget(per_s=UNSOLICITED_ECHOES_PER_S)
        self._unsolicited_prefix_budgets = KeyedBudget(per_s=UNSOLICITED_ECHOES_PER_PREFIX_PER_S)
        self._tokens = AddressTokens(os.urandom(32))
        # Tokens count whole seconds in 32 bits from our start: a clock may stand anywhere.
        self._started_at = trio.current_time()
        self._driver: InspectionDriver | None = None
        self.findings: Findings | None = None
        """Of the newest inspection, also while it is under way; None before the first."""
        self.refused_count = 0
        """Requests that were over a budget, or named an address without a valid token."""

    # Answering ------------------------------------------------------------------------------------

    def answer_untrusted(
        self, data: bytes, source: Endpoint, *, arrived_at_alternate: bool = False
    ) -> None:
        """Answer an echo request, from the port it came to or, if it asks so, from port q.

        Raises:
            DecodeError: Not an authentic request.
        """
        now = trio.current_time()
        # The narrowest first, so that a flood uses up its own budget and not everybody's.
        if not (
            self._address_budgets.take(source.ip, now)
            and self._prefix_budgets.take(prefix_of(source.ip), now)
            and self._budget.take(now)
        ):
            self.refused_count += 1
            return
        request = decode_echo_request_untrusted(data)
        destination = request.deliver_to or source
        age_s = max(0.0, now - self._started_at)
        if request.deliver_to is not None and not self._tokens.is_valid(
            request.token, request.sender, destination.ip, age_s
        ):
            self.refused_count += 1
            return
        token = NO_TOKEN
        if destination.ip == source.ip:
            token = self._tokens.issue(request.sender, source.ip, age_s)
        from_alternate = arrived_at_alternate or request.from_alternate_port
        reply = self._reply(request, source, token, from_alternate=from_alternate)
        if len(reply) <= len(data):
            port = self._alternate_port if from_alternate else self._main_port
            port.send(self._swarm.seal(reply), destination)

    def _reply(
        self, request: EchoRequest, observed: Endpoint, token: bytes, *, from_alternate: bool
    ) -> bytes:
        return EchoReply(
            request.transaction,
            self._identity.peer_id,
            observed,
            token,
            from_alternate_port=from_alternate,
        ).encode(self._identity)

    def answer_for_neighbour(self, transaction: bytes, observed: Endpoint) -> None:
        """Send a reply to whoever asked a neighbour of ours, which vouches for the address."""
        now = trio.current_time()
        if self._unsolicited_prefix_budgets.take(
            prefix_of(observed.ip), now
        ) and self._unsolicited_budget.take(now):
            reply = EchoReply(
                transaction, self._identity.peer_id, observed, is_unsolicited=True
            ).encode(self._identity)
            self._main_port.send(self._swarm.seal(reply), observed)
        else:
            self.refused_count += 1

    # Asking ---------------------------------------------------------------------------------------

    def receive_reply_untrusted(self, data: bytes, source: Endpoint) -> None:
        """Take an echo reply that came to the main port.

        Raises:
            DecodeError: Not an authentic reply.
        """
        if self._driver is not None:
            self._driver.receive_untrusted(0, data, source)

    async def inspect(
        self,
        observers: Sequence[Observer],
        *,
        tests: Iterable[NatTest] = QUICK,
        host_candidates: Sequence[Endpoint],
        witnessed: Sequence[Observation] = (),
        rng: random.Random,
        ask_neighbour: AskNeighbour,
    ) -> Findings:
        """Ask `observers` what they see of us; one inspection at a time.

        Whatever keeps a test from going on (no more ports, an interface that vanishes, the main
        port closed) ends that test, and shows as the reason of what is unknown. Cancelled, it
        closes the fresh ports; `findings` has what was found by then.

        Args:
            observers: Whom to ask.
            tests: What to find out.
            host_candidates: Our own addresses with the main port.
            witnessed: What others than peers have just told.
            rng: Draws transactions.
            ask_neighbour: Asks a neighbour that a third peer send a reply to an endpoint of ours.
        """
        machine = NatInspection(
            observers,
            tests=tests,
            local_endpoints=host_candidates,
            witnessed=witnessed,
            rng=rng,
            now=trio.current_time(),
        )
        self.findings = machine.findings
        self._driver = InspectionDriver(
            machine,
            self._identity,
            self._network,
            self._bind_ip,
            self._main_port,
            ask_neighbour,
            self._swarm,
        )
        try:
            await self._driver.run()
        finally:
            self._driver = None
        return machine.findings
