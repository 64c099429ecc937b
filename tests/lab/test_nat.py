"""The kernel's NATs are what their names say: plain UDP sockets on both sides."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from natswarm.lab.nat import BLOCK_PORTS, KernelNat, NatKind, loss_ruleset
from natswarm.lab.topology import Host, Lab

pytestmark = pytest.mark.lab

OpenSocket = Callable[[Host], socket.socket]

# Twelve or more echoes fit the allocation law.
REMOTE_COUNT = 16
# Of 16 draws from 1,024 ports, fewer than 12 distinct ones come up once in 10^9 runs; the kernel
# may give two remotes one port.
DISTINCT_MIN = 12


def ports_seen(lab: Lab, nat: KernelNat, open_socket: OpenSocket) -> tuple[int, list[int]]:
    """Send from one port of a client to 16 endpoints of two hosts: our port, and what they see."""
    observers = [lab.add_public("first"), lab.add_public("second")]
    client = lab.add_client("client", nat)
    udp = open_socket(client)
    seen = []
    for index in range(REMOTE_COUNT):
        remote = open_socket(observers[index % 2])
        udp.sendto(b"where am I?", remote.getsockname())
        _, (ip, port) = remote.recvfrom(100)
        assert ip == client.public_ip
        seen.append(port)
    return udp.getsockname()[1], seen


def test_preserving_keeps_the_port_towards_everybody(lab: Lab, open_socket: OpenSocket):
    own_port, seen = ports_seen(lab, KernelNat(NatKind.PRESERVING), open_socket)
    assert seen == [own_port] * REMOTE_COUNT


def test_random_draws_a_port_for_each_remote(lab: Lab, open_socket: OpenSocket):
    _, seen = ports_seen(lab, KernelNat(NatKind.RANDOM), open_socket)
    assert len(set(seen)) >= DISTINCT_MIN
    assert max(seen) - min(seen) > BLOCK_PORTS
    assert min(seen) >= 1024


@pytest.mark.parametrize("block_base", [40_960, 41_216])
def test_block_draws_from_the_block_alone(lab: Lab, open_socket: OpenSocket, block_base: int):
    nat = KernelNat(NatKind.BLOCK, block_base=block_base)
    _, seen = ports_seen(lab, nat, open_socket)
    assert set(seen) <= set(nat.block)
    assert len(set(seen)) >= DISTINCT_MIN


def test_block_moves_a_port_that_lies_in_it(lab: Lab, open_socket: OpenSocket):
    # 60,000 ports would do for a home router; here a port of ours in the block must move, too.
    nat = KernelNat(NatKind.BLOCK)
    client = lab.add_client("client", nat)
    remote = open_socket(lab.add_public("remote"))
    seen = []
    for port in nat.block[:3]:
        with client.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind((client.ip, port))
            udp.sendto(b"", remote.getsockname())
        seen.append(remote.recvfrom(100)[1][1])
    assert seen != list(nat.block[:3])


@pytest.mark.parametrize("kind", NatKind)
def test_only_the_endpoint_we_sent_to_may_answer(lab: Lab, open_socket: OpenSocket, kind: NatKind):
    observer, stranger_host = lab.add_public("observer"), lab.add_public("stranger")
    udp = open_socket(lab.add_client("client", KernelNat(kind)))
    friend, same_address, stranger = map(open_socket, (observer, observer, stranger_host))
    udp.sendto(b"hello", friend.getsockname())
    _, mapped = friend.recvfrom(100)

    stranger.sendto(b"from a stranger", mapped)
    same_address.sendto(b"from another port", mapped)
    friend.sendto(b"from the one we sent to", mapped)

    # Were the others let in, they would have come first.
    assert udp.recvfrom(100) == (b"from the one we sent to", friend.getsockname())
    udp.setblocking(False)
    with pytest.raises(BlockingIOError):
        udp.recvfrom(100)


@pytest.mark.parametrize("is_poisonable", [False, True])
def test_an_early_datagram_of_the_peer_moves_our_port_only_where_the_router_accepts_it(
    lab: Lab, open_socket: OpenSocket, is_poisonable: bool
):
    client = lab.add_client("client", KernelNat(NatKind.PRESERVING, is_poisonable=is_poisonable))
    peer, udp = open_socket(lab.add_public("peer")), open_socket(client)
    port = udp.getsockname()[1]

    peer.sendto(b"too early", (client.public_ip, port))
    udp.sendto(b"hello", peer.getsockname())

    _, (_, seen) = peer.recvfrom(100)
    assert (seen != port) is is_poisonable


def test_two_clients_meet_by_sending_to_each_other(lab: Lab, open_socket: OpenSocket):
    hosts = [lab.add_client(name, KernelNat(NatKind.PRESERVING)) for name in "ab"]
    a, b = map(open_socket, hosts)
    at_a = (hosts[0].public_ip, a.getsockname()[1])
    at_b = (hosts[1].public_ip, b.getsockname()[1])

    a.sendto(b"dies at the NAT of b", at_b)
    b.sendto(b"gets in", at_a)
    assert a.recvfrom(100) == (b"gets in", at_b)
    a.sendto(b"gets in, too", at_b)
    assert b.recvfrom(100) == (b"gets in, too", at_a)


def test_lifetimes_belong_to_one_router(lab: Lab):
    nat = KernelNat(NatKind.PRESERVING, unreplied_lifetime_s=7, replied_lifetime_s=77)
    routers = [
        lab.add_client("short", nat).router,
        lab.add_client("usual", KernelNat(nat.kind)).router,
    ]
    read = ["cat"] + [f"/proc/sys/{key.replace('.', '/')}" for key in nat.sysctls]
    values = [router.run(read, timeout_s=10).split() for router in routers if router is not None]
    assert values == [["7", "77"], ["30", "120"]]


def test_loss_is_what_was_asked_for(open_socket: OpenSocket):
    with Lab(loss=0.25) as lab:
        sender, receiver = map(open_socket, (lab.add_public("sender"), lab.add_public("receiver")))
        arrived_count = 0
        for number in range(50):  # rounds that fit the receiver's buffer
            end = b"%d" % number
            for data in [b"datagram"] * 20 + [end] * 20:
                sender.sendto(data, receiver.getsockname())
            while (data := receiver.recv(100)) != end:
                arrived_count += data == b"datagram"
    assert 650 < arrived_count < 850  # seven standard deviations


@pytest.mark.parametrize("block_base", [1023, 65_000])
def test_a_block_lies_among_the_ports(block_base: int):
    with pytest.raises(ValueError, match="no block"):
        KernelNat(NatKind.BLOCK, block_base=block_base)


@pytest.mark.parametrize("loss", [-0.1, 1.0])
def test_loss_is_a_share(loss: float):
    with pytest.raises(ValueError, match="lies from 0"):
        loss_ruleset(loss)
