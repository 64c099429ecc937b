"""Rounds between peers over a network that loses, repeats, reorders and damages, replayed by seed.

A failing run prints its seed; the seed replays it.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random

import msgspec
import numpy as np
import pytest

from llmload.config import GPT2Config
from llmload.learn.gossip import (
    PARTICIPANT_COUNT_MAX,
    SEND_COUNT_MAX,
    GossipRound,
    RoundFinished,
    RoundSettled,
    ShardReceipt,
    mean_in_order,
)
from llmload.learn.shards import (
    Codec,
    ParameterSpace,
    ShardHeader,
    ShardLayout,
    decode_shard_untrusted,
    encode_shard,
)
from llmload.learn.trainer import Trainer, batches
from llmload.weights import random_weights
from natswarm.identity import PeerId
from natswarm.message import decode_message_untrusted, encode_message

LAYOUT = ShardLayout(ParameterSpace.of({"a": (40, 25), "b": (50,)}), 100)  # 11 shards
ROUND = 9
DEADLINE_S = 1000.0


def peer_id(number):
    return PeerId(bytes([number]) * 32)


A, B, C, STRANGER = (peer_id(number) for number in (1, 2, 3, 99))


def random_gradients(count, seed, layout=LAYOUT):
    """Return gradients by peer. Sizes differ, so the order of a sum shows in its last bits."""
    rng = np.random.default_rng(seed)
    return {
        peer_id(1 + i): (rng.standard_t(3, layout.space.size) * 10.0**-i).astype(np.float32)
        for i in range(count)
    }


def start(gradients, layout=LAYOUT, codec=Codec.INT8X64, **options):
    """Return a round for each peer."""
    defaults = {"round_number": ROUND, "now": 0.0, "deadline_s": DEADLINE_S}
    return {
        me: GossipRound(
            layout,
            me=me,
            participants=list(gradients),
            gradient=gradient,
            codec=codec,
            **(defaults | options),
        )
        for me, gradient in gradients.items()
    }


def averaged_in_one_process(gradients, layout=LAYOUT, codec=Codec.INT8X64):
    """Return the mean of what each gradient looks like after its codec, in the order of ids."""
    average = np.empty(layout.space.size, dtype=np.float32)
    for shard in range(layout.shard_count):
        total = np.float32(0)
        for _, gradient in sorted(gradients.items()):
            encoded = encode_shard(
                layout, shard, gradient[layout.bounds(shard)], codec=codec, round_number=0
            )
            total = total + decode_shard_untrusted(layout, encoded.header, encoded.payload)
        average[layout.bounds(shard)] = total / np.float32(len(gradients))
    return average


class Faults:
    """A network between rounds: every message may be lost, doubled, delayed, damaged."""

    def __init__(self, seed, *, loss=0.0, duplication=0.0, damage=0.0, until_s=math.inf):
        print(f"network seed {seed}")
        self.rng = random.Random(seed)
        self.loss, self.duplication, self.damage = loss, duplication, damage
        self.until_s = until_s

    def deliveries(self, encoded, payload, now):
        """Return (time, header, payload) for each copy that arrives."""
        copies = []
        for _ in range(1 + (self.rng.random() < self.duplication)):
            if now < self.until_s and self.rng.random() < self.loss:
                continue
            received = bytearray(payload)
            if received and now < self.until_s and self.rng.random() < self.damage:
                # Shorter: always noticed. A flipped bit in a payload is the transport's business.
                del received[-1]
            copies.append((now + self.rng.uniform(0.01, 2.0), encoded, bytes(received)))
        return copies


def run(rounds, faults=None):
    """Carry messages until nothing is under way and no timer is left; return events and time."""
    faults = faults or Faults(0)
    counter = itertools.count()
    under_way = []  # (time, tie-breaker, sender, receiver, header, payload)
    events = {me: [] for me in rounds}
    now = 0.0

    def collect():
        for me, gossip in rounds.items():
            for peer in gossip.peers:
                while (message := gossip.next_message(peer)) is not None:
                    header, payload = encode_message(message[0]), message[1]
                    for time, *copy in faults.deliveries(header, payload, now):
                        heapq.heappush(under_way, (time, next(counter), me, peer, *copy))
            while (event := gossip.next_event()) is not None:
                events[me].append(event)

    collect()
    while True:
        timers = [timer for gossip in rounds.values() if (timer := gossip.next_timer()) is not None]
        if not under_way and not timers:
            return events, now
        if under_way and under_way[0][0] <= min(timers, default=math.inf):
            now, _, sender, receiver, encoded, payload = heapq.heappop(under_way)
            if receiver in rounds:
                header = decode_message_untrusted(encoded, ShardHeader, ShardReceipt)
                rounds[receiver].receive(sender, header, payload, now)
        else:
            now = min(timers)
            for gossip in rounds.values():
                gossip.handle_timer(now)
        collect()


def result_of(events):
    (finished,) = [event for event in events if isinstance(event, RoundFinished)]
    return finished.result


def settlement_of(events):
    (settled,) = [event for event in events if isinstance(event, RoundSettled)]
    return settled


# --- Everybody ends with the same --------------------------------------------------------------


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_averages_are_that_of_one_process_to_the_last_bit(count, codec):
    gradients = random_gradients(count, seed=1)
    expected = averaged_in_one_process(gradients, codec=codec).tobytes()
    events, now = run(start(gradients, codec=codec))
    for seen in events.values():
        result = result_of(seen)
        assert result.average.tobytes() == expected
        assert result.is_complete
        assert np.array_equal(result.contribution_counts, np.full(11, count))
        assert settlement_of(seen) == RoundSettled(is_unanimous=True, unconfirmed=())
    assert now < 10  # two one-way delays, no timer


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [2, 4])
def test_faults_change_nothing_but_counters(count, seed):
    gradients = random_gradients(count, seed)
    rounds = start(gradients)
    faults = Faults(seed, loss=0.3, duplication=0.3, damage=0.1, until_s=20)
    events, now = run(rounds, faults)
    expected = averaged_in_one_process(gradients).tobytes()
    for me, seen in events.items():
        assert result_of(seen).average.tobytes() == expected
        assert settlement_of(seen).is_unanimous, rounds[me].statistics
    # Liveness: some rounds of questions after the faults have stopped, all know that all are done.
    assert now < 20 + 5 * 6.0
    counted = [gossip.statistics for gossip in rounds.values()]
    assert sum(statistics.duplicate + statistics.damaged for statistics in counted) > 0


def test_peers_may_use_different_codecs():
    gradients = random_gradients(2, seed=3)
    rounds = start(gradients, codec=Codec.FP16)
    rounds[B] = start(gradients, codec=Codec.INT8X256)[B]
    events, _ = run(rounds)
    averages = [result_of(seen).average for seen in events.values()]
    assert averages[0].tobytes() == averages[1].tobytes()


def test_the_order_of_participants_does_not_matter():
    gradients = random_gradients(4, seed=4)
    backwards = dict(reversed(gradients.items()))
    expected = result_of(run(start(gradients))[0][A]).average
    again = result_of(run(start(backwards), Faults(5))[0][A]).average
    assert again.tobytes() == expected.tobytes()


def test_the_order_of_a_sum_shows_in_its_bits():
    # If not, the tests above would prove nothing.
    vectors = list(random_gradients(4, seed=4).values())
    assert mean_in_order(vectors).tobytes() != mean_in_order(vectors[::-1]).tobytes()


def test_training_over_two_peers_is_training_in_one_process():
    config = GPT2Config(vocab_size=32, n_ctx=8, n_embd=16, n_layer=1, n_head=2)
    weights = random_weights(config, 1)
    text = np.random.default_rng(2).integers(32, size=300)

    def streams():
        return [batches(text, batch=2, time=8, rng=np.random.default_rng(s)) for s in (10, 11)]

    trainers = {A: Trainer(config, weights), B: Trainer(config, weights)}
    layout = ShardLayout(trainers[A].space, 512)
    peers_streams = dict(zip(trainers, streams(), strict=True))
    alone, alone_streams = Trainer(config, weights), streams()
    for number in range(3):
        gradients = {
            me: trainer.gradients(*next(peers_streams[me]))[1] for me, trainer in trainers.items()
        }
        events, _ = run(
            start(gradients, layout, round_number=number), Faults(number, loss=0.2, until_s=5)
        )
        for me, trainer in trainers.items():
            trainer.apply(result_of(events[me]).average)
        both = {
            me: alone.gradients(*next(stream))[1]
            for me, stream in zip(trainers, alone_streams, strict=True)
        }
        alone.apply(averaged_in_one_process(both, layout))
        assert trainers[A].parameters.tobytes() == trainers[B].parameters.tobytes()
        assert trainers[A].parameters.tobytes() == alone.parameters.tobytes()


# --- Who is missing is left out, and the result says so ----------------------------------------


def test_a_silent_peer_is_left_out_at_the_deadline():
    gradients = random_gradients(3, seed=6)
    rounds = start(gradients)
    del rounds[C]
    events, now = run(rounds)
    assert now == DEADLINE_S
    present = {me: gradients[me] for me in (A, B)}
    expected = averaged_in_one_process(present).tobytes()
    for me, other in ((A, B), (B, A)):
        result = result_of(events[me])
        assert result.average.tobytes() == expected
        assert not result.is_complete
        assert result.missing_shard_counts == {C: 11}
        assert np.array_equal(result.contribution_counts, np.full(11, 2))
        assert settlement_of(events[me]) == RoundSettled(is_unanimous=False, unconfirmed=(other, C))


def test_alone_the_average_is_our_own():
    gradients = random_gradients(2, seed=7)
    rounds = start(gradients)
    del rounds[B]
    events, _ = run(rounds)
    own = averaged_in_one_process({A: gradients[A]})
    assert result_of(events[A]).average.tobytes() == own.tobytes()
    assert result_of(events[A]).contribution_counts.tolist() == [1] * 11


def messages(gossip, peer):
    return list(iter(lambda: gossip.next_message(peer), None))


def test_contributions_are_counted_shard_by_shard():
    gradients = random_gradients(2, seed=8)
    rounds = start(gradients)
    for header, payload in messages(rounds[B], A)[:4]:
        rounds[A].receive(B, header, payload, now=1.0)
    rounds[A].handle_timer(DEADLINE_S)
    result = rounds[A].next_event().result
    assert result.contribution_counts.tolist() == [2] * 4 + [1] * 7
    assert result.missing_shard_counts == {B: 7}
    together = averaged_in_one_process(gradients)
    own = averaged_in_one_process({A: gradients[A]})
    assert np.array_equal(result.average[:400], together[:400])
    assert np.array_equal(result.average[400:], own[400:])


def test_a_peer_that_did_not_get_everything_is_known():
    """A has all of B, B lacks one shard of A: their averages differ, and A can know it."""
    rounds = start(random_gradients(2, seed=9))
    for header, payload in messages(rounds[B], A):
        rounds[A].receive(B, header, payload, now=1.0)
    assert rounds[A].next_event().result.is_complete
    sent = [message for message in messages(rounds[A], B) if isinstance(message[0], ShardHeader)]
    for header, payload in sent[:-1]:
        rounds[B].receive(A, header, payload, now=1.0)
    for gossip in rounds.values():
        gossip.handle_timer(DEADLINE_S)
    assert rounds[A].next_event() == RoundSettled(is_unanimous=False, unconfirmed=(B,))
    assert rounds[B].next_event().result.missing_shard_counts == {A: 1}
    # A question that was due at the deadline would only be answered too late.
    assert messages(rounds[B], A) == []


def test_a_late_shard_changes_nothing():
    rounds = start(random_gradients(2, seed=10))
    rounds[A].handle_timer(DEADLINE_S)
    result = rounds[A].next_event().result
    before = result.average.tobytes()
    (header, payload), *_ = messages(rounds[B], A)
    rounds[A].receive(B, header, payload, now=DEADLINE_S + 1)
    assert result.average.tobytes() == before
    assert rounds[A].statistics.late == 1


# --- Messages that do not belong here ----------------------------------------------------------


def test_what_does_not_belong_is_counted_and_nothing_else():
    gradients = random_gradients(2, seed=11)
    rounds = start(gradients)
    (header, payload), *rest = messages(rounds[B], A)
    replace = msgspec.structs.replace
    gossip = rounds[A]
    for sender, wrong_header, wrong_payload in [
        (STRANGER, header, payload),
        (A, header, payload),  # our own, come back
        (B, replace(header, layout=bytes(16)), payload),
        (B, replace(header, round=ROUND - 1), payload),
        (B, replace(header, round=ROUND + 1), payload),
        (B, replace(header, shard=11), payload),
        (B, replace(header, codec="fp8"), payload),
        (B, header, payload[:-1]),
        (B, header, b"\xff" * len(payload)),  # NaN as scale
        (B, ShardReceipt(ROUND, LAYOUT.hash, b"", is_complete=True, knows_complete=True), b""),
    ]:
        gossip.receive(sender, wrong_header, wrong_payload, now=1.0)
    assert gossip.next_event() is None
    for good in [(header, payload), *rest, (header, payload)]:
        gossip.receive(B, *good, now=2.0)
    result = gossip.next_event().result
    assert result.average.tobytes() == averaged_in_one_process(gradients).tobytes()
    assert msgspec.structs.asdict(header)["round"] == ROUND
    assert vars(gossip.statistics) == {
        "duplicate": 1,
        "damaged": 5,
        "foreign": 3,
        "other_round": 2,
        "late": 0,
        "refused": 0,
    }


def test_a_shard_is_not_sent_again_for_ever():
    gossip = start(random_gradients(2, seed=12))[A]
    nothing_held = ShardReceipt(
        ROUND, LAYOUT.hash, bytes(2), is_complete=False, knows_complete=False
    )
    sent_count = 0
    for _ in range(100):
        gossip.receive(B, nothing_held, b"", now=1.0)
        gossip.receive(B, nothing_held, b"", now=1.0)  # while the answer is still queued
        sent_count += len(messages(gossip, B))
    assert sent_count == 11 * SEND_COUNT_MAX
    assert gossip.statistics.refused > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_shared(value):
    gradients = random_gradients(2, seed=13)
    gradients[A][-1] = value
    with pytest.raises(ValueError, match="shard 10 holds NaN"):
        start(gradients)


def test_participants_are_bounded():
    gradient = random_gradients(1, seed=14)[A]
    for count in (1, PARTICIPANT_COUNT_MAX + 1):
        with pytest.raises(ValueError, match=f"{count} participants"):
            start(dict.fromkeys(map(peer_id, range(1, count + 1)), gradient))


# --- Timers and receipts -----------------------------------------------------------------------


def test_silence_is_followed_by_a_question():
    gossip = start(random_gradients(2, seed=15), ask_after_s=5.0)[A]
    messages(gossip, B)
    assert gossip.next_timer() == 5.0
    gossip.handle_timer(4.9)
    assert messages(gossip, B) == []
    gossip.handle_timer(5.0)
    ((receipt, payload),) = messages(gossip, B)
    assert receipt == ShardReceipt(
        ROUND, LAYOUT.hash, bytes(2), is_complete=False, knows_complete=False
    )
    assert payload == b""
    assert gossip.next_timer() == 10.0


def test_a_peer_that_is_sending_is_not_asked():
    rounds = start(random_gradients(2, seed=16))
    messages(rounds[A], B)
    for second, (header, payload) in enumerate(messages(rounds[B], A)[:-1], start=1):
        rounds[A].receive(B, header, payload, now=float(second))
        rounds[A].handle_timer(float(second))
    assert messages(rounds[A], B) == []
    assert rounds[A].next_timer() == 15.0


def test_nothing_is_due_after_the_round_is_settled():
    rounds = start(random_gradients(2, seed=17))
    run(rounds)
    for gossip in rounds.values():
        assert gossip.next_timer() is None
        gossip.handle_timer(2 * DEADLINE_S)
        assert gossip.next_event() is None
    # But a peer whose last receipt was lost is answered.
    asks = ShardReceipt(ROUND, LAYOUT.hash, b"\xff\x07", is_complete=True, knows_complete=False)
    rounds[A].receive(B, asks, b"", now=1.0)
    ((answer, _),) = messages(rounds[A], B)
    assert answer.is_complete
    assert answer.knows_complete


def test_wire_format_of_a_receipt():
    receipt = ShardReceipt(7, bytes(range(16)), b"\xfb\x07", is_complete=False, knows_complete=True)
    assert encode_message(receipt).hex() == (
        "86a474797065ac536861726452656365697074a5726f756e6407a66c61796f7574c410000102"
        "030405060708090a0b0c0d0e0fa468656c64c402fb07ab69735f636f6d706c657465c2ae6b6e"
        "6f77735f636f6d706c657465c3"
    )
