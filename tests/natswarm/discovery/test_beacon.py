from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natswarm.address import Endpoint
from natswarm.discovery.beacon import BEACON_BYTES, SALT_BYTES, BeaconCipher
from natswarm.discovery.beacon_schedule import (
    ANNOUNCE_INTERVAL_S,
    FORGOTTEN_S,
    HEARD_AGAIN_S,
    HEARD_MAX,
    HEARD_PER_ADDRESS_MAX,
    BeaconSchedule,
    Link,
    PeerHeard,
)
from natswarm.errors import DecodeError
from natswarm.identity import Identity
from natswarm.swarm_key import SwarmKey

ME, KIM, EVE = (Identity(name.ljust(32, b".")) for name in (b"me", b"kim", b"eve"))
HERE = Link("eth0", "192.168.1.2")
KIM_AT = Endpoint("192.168.1.7", 4000)
OPEN = BeaconCipher()
PRIVATE = BeaconCipher(SwarmKey(b"p" * 32))
SALT = bytes(range(SALT_BYTES))


def schedule(identity: Identity = ME, cipher: BeaconCipher = OPEN, seed: int = 1) -> BeaconSchedule:
    rng = random.Random(seed)
    return BeaconSchedule(identity, port=4000, cipher=cipher, rng=rng, entropy=rng.randbytes)


def from_kim(endpoint: Endpoint = KIM_AT, identity: Identity = KIM, cipher: BeaconCipher = OPEN):
    return cipher.encode(identity, endpoint, SALT)


def sent_until(machine: BeaconSchedule, end: float) -> list[tuple[float, Link]]:
    sent = []
    while (timer := machine.next_timer()) is not None and timer <= end:
        sent += [(timer, link) for link, _ in machine.datagrams_to_send(timer)]
    return sent


def test_the_format_is_pinned():
    assert from_kim().hex() == (
        "6e737701"
        "000102030405060708090a0b"
        "7faefcc395335cdcdc1154a2f4ce8475055927b81e38b699184f75e31a994fa6bea019bbb6f740c5"
        "77ac78a913d53e9589bd47642d6645d6c2a239e870b3f1e189b3678a6648e4d7da6efb14065ac260"
        "b5a523b0f0b3ddf027e19bfec685cbbb124f127eee5cef4b8f7a41878e2afb5ac07d809d14506d89"
        "a964bb26e40161032abb"
    )


@pytest.mark.parametrize("ip", ["192.168.1.7", "fe80::7%eth0", "2001:db8::7"])
def test_a_beacon_survives_the_way(ip):
    beacon = OPEN.decode_untrusted(from_kim(Endpoint(ip, 4000)) + b"later versions")
    beacon.verify_untrusted()
    assert (beacon.sender, beacon.endpoint) == (
        KIM.peer_id,
        Endpoint(ip.partition("%")[0], 4000),
    )


@given(st.integers(0, BEACON_BYTES - 1), st.integers(1, 255), st.booleans())
def test_damage_is_a_decode_error(index, mask, is_cut):
    data = bytearray(from_kim())
    if is_cut:
        del data[index:]
    else:
        data[index] ^= mask
    with pytest.raises(DecodeError):
        OPEN.decode_untrusted(bytes(data))


@given(st.binary(max_size=300))
def test_strangers_bytes_cause_nothing(data):
    machine = schedule()
    assert machine.receive_untrusted(data, KIM_AT, "eth0", 0.0) is None
    assert machine.statistics().foreign_count == 1


def test_nothing_of_a_private_swarm_shows():
    one, other = (PRIVATE.encode(KIM, KIM_AT, bytes([salt] * SALT_BYTES)) for salt in (1, 2))
    for secret in (KIM.peer_id.key, KIM_AT.to_bytes(), b"p" * 32):
        assert secret not in one
    assert sum(a == b for a, b in zip(one[16:], other[16:], strict=True)) < 10


def test_swarms_on_one_lan_stay_apart():
    for ours, theirs in (
        (OPEN, PRIVATE),
        (PRIVATE, OPEN),
        (PRIVATE, BeaconCipher(SwarmKey(b"q" * 32))),
    ):
        machine = schedule(cipher=ours)
        assert machine.receive_untrusted(from_kim(cipher=theirs), KIM_AT, "eth0", 0.0) is None
        assert machine.statistics().foreign_count == 1
        heard = machine.receive_untrusted(from_kim(cipher=ours), KIM_AT, "eth0", 0.0)
        assert heard == PeerHeard(KIM.peer_id, KIM_AT, "eth0")


def test_a_beacon_counts_from_the_address_it_names_alone():
    machine = schedule()
    for elsewhere in ("192.168.1.8", "8.8.8.8", "fe80::7%eth0"):
        source = Endpoint(elsewhere, 26_773)
        assert machine.receive_untrusted(from_kim(), source, "eth0", 0.0) is None
    assert machine.statistics().forged_count == 3
    # The port that counts is the signed one; the scope is what our system says.
    signed, source = Endpoint("fe80::7", 4000), Endpoint("fe80::7%eth0", 50_123)
    heard = machine.receive_untrusted(from_kim(signed), source, "eth0", 0.0)
    assert heard == PeerHeard(KIM.peer_id, Endpoint("fe80::7%eth0", 4000), "eth0")


def test_who_knows_the_open_key_cannot_speak_for_others():
    real = OPEN.decode_untrusted(from_kim())
    body = KIM.peer_id.key + real.endpoint.to_bytes() + EVE.sign(b"x")
    forged = b"nsw\x01" + SALT + OPEN._cipher.encrypt(SALT, body, b"nsw\x01")
    machine = schedule()
    assert machine.receive_untrusted(forged, KIM_AT, "eth0", 0.0) is None
    assert machine.statistics().forged_count == 1
    assert machine.receive_untrusted(from_kim(), KIM_AT, "eth0", 0.0) is not None


def test_our_own_beacon_is_no_news():
    machine = schedule()
    machine.add_link(HERE, 0.0)
    (_, data) = machine.datagrams_to_send(1.0)[0]
    assert machine.receive_untrusted(data, Endpoint(HERE.ip, 9), "eth0", 1.0) is None
    assert machine.statistics().heard_count == 0


@pytest.mark.parametrize("seed", range(5))
def test_beacons_are_rare_and_jittered(seed):
    machine = schedule(seed=seed)
    machine.add_link(HERE, 100.0)
    times = [time - 100 for time, _ in sent_until(machine, 100 + 3600)]
    assert 0 <= times[0] <= 1
    assert 3 <= times[1] <= 4
    assert 12 <= times[2] <= 13
    gaps = [b - a for a, b in itertools.pairwise(times[2:])]
    assert all(0.9 * ANNOUNCE_INTERVAL_S <= gap <= 1.1 * ANNOUNCE_INTERVAL_S for gap in gaps)
    assert len(set(gaps)) == len(gaps)
    assert 10 <= len(gaps) <= 14


def test_links_come_and_go():
    machine = schedule()
    assert machine.next_timer() is None
    machine.add_link(HERE, 0.0)
    sent_until(machine, 20)
    wifi = Link("wlan0", "fe80::2")
    machine.add_link(wifi, 50.0)
    assert {link for _, link in sent_until(machine, 70)} == {wifi}
    machine.remove_link(HERE)
    assert {link for _, link in sent_until(machine, 700)} == {wifi}
    machine.remove_link(wifi)
    assert machine.next_timer() is None


def test_a_newcomer_is_answered_once_a_minute_where_it_is():
    machine = schedule()
    wifi, wifi6 = Link("wlan0", "192.168.1.3"), Link("wlan0", "fe80::3")
    for link in (HERE, wifi, wifi6):
        machine.add_link(link, 0.0)
    sent_until(machine, 20)
    assert machine.receive_untrusted(from_kim(), KIM_AT, "wlan0", 30.0)
    # The last beacon there was at 12..13 s: a minute later, and no sooner.
    [(time, link)] = sent_until(machine, 100)
    assert link == wifi
    assert 72 <= time <= 73
    for index in range(10):
        source = Endpoint(f"192.168.1.{50 + index}", 4000)
        machine.receive_untrusted(from_kim(source), source, "wlan0", 200.0)
    [(time, link)] = sent_until(machine, 250)
    assert (link, 200.2 <= time <= 202) == (wifi, True)


def test_a_peer_is_news_again_after_a_while():
    machine = schedule()
    news = [
        machine.receive_untrusted(from_kim(), KIM_AT, "eth0", now) is not None
        for now in (0.0, 1.0, HEARD_AGAIN_S - 0.1, HEARD_AGAIN_S, HEARD_AGAIN_S + 1)
    ]
    assert news == [True, False, False, True, False]


def test_a_flood_of_keys_is_bounded_and_leaves_others_alone():
    machine = schedule()
    for index in range(100):
        stranger = Identity(index.to_bytes(32, "big"))
        machine.receive_untrusted(from_kim(identity=stranger), KIM_AT, "eth0", 0.0)
    assert len(machine._heard) == HEARD_PER_ADDRESS_MAX
    assert machine.statistics().crowded_count == 100 - HEARD_PER_ADDRESS_MAX
    other = Endpoint("192.168.1.9", 4000)
    assert machine.receive_untrusted(from_kim(other), other, "eth0", 1.0)
    # A machine whose nodes come and go has room again.
    assert machine.receive_untrusted(from_kim(), KIM_AT, "eth0", 2 + FORGOTTEN_S)
    for index in range(2 * HEARD_MAX):
        source = Endpoint(f"10.0.{index // 200}.{index % 200 + 1}", 4000)
        assert machine.receive_untrusted(from_kim(source), source, "eth0", 3.0 + FORGOTTEN_S)
    assert len(machine._heard) == HEARD_MAX
