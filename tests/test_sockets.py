"""Real sockets: requests take effect once, peers that are gone are noticed, deadlines hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
import zmq

from asyncgrpo.errors import ConfigError, PeerTimeout, WireError
from asyncgrpo.wire import sockets
from asyncgrpo.wire.codec import SCHEMA, Packet, decode, encode
from asyncgrpo.wire.sockets import DealerClient, Server

Item = TypeVar("Item")


@pytest.fixture
def address(tmp_path) -> str:
    return f"ipc://{tmp_path}/socket"


@pytest.fixture
def server(address):
    opened = Server(address)
    yield opened
    opened.close()


@pytest.fixture
def client(address):
    opened = DealerClient(address, "actor-0", "the buffer")
    yield opened
    opened.close()


def arrived(ask: Callable[[], list[Item]]) -> list[Item]:
    """What `ask` returns once it returns something: a turn may bring garbage or repeats alone."""
    end = time.monotonic() + 60.0
    while not (found := ask()):
        assert time.monotonic() < end, "nothing came"
    return found


def receive(server: Server) -> tuple[str, Packet]:
    ((peer, packet),) = arrived(lambda: server.receive(1.0))
    return peer, packet


def echo(packet: Packet) -> Packet:
    return Packet(kind="echo", request_id=packet.request_id, fields=packet.fields)


def test_a_call_gets_its_own_answer_and_keeps_others_for_later(server, client):
    first = client.post(Packet(kind="one"))

    def serve():
        seen = []
        while len(seen) < 2:
            seen += server.receive(5.0)
        for peer, packet in seen:
            server.answer(peer, echo(packet))

    thread = threading.Thread(target=serve)
    thread.start()
    answer = client.call(Packet(kind="two", fields={"x": 2}), 5.0)
    thread.join()
    assert answer.fields == {"x": 2}
    assert [packet.request_id for packet in client.poll(1.0)] == [first]


def test_what_arrives_with_the_answer_to_a_call_is_kept(server, client, monkeypatch):
    post = client.post

    def post_and_wait(packet):
        request = post(packet)
        peer, asked = receive(server)
        server.answer(peer, echo(asked))
        server.push(peer, Packet(kind="offer"))
        time.sleep(0.05)
        return request

    monkeypatch.setattr(client, "post", post_and_wait)
    assert client.call(Packet(kind="bye"), 5.0).request_id == 1
    assert [packet.kind for packet in client.poll(1.0)] == ["offer"]


def test_a_repeated_request_is_answered_again_but_handed_out_once(server, client, monkeypatch):
    monkeypatch.setattr(sockets, "RESEND_SECONDS", 0.0)
    client.post(Packet(kind="put"))
    peer, packet = receive(server)
    client.poll(0.0)  # repeats it: the answer is late
    assert server.receive(0.2) == []
    server.answer(peer, echo(packet))
    (answer,) = arrived(lambda: client.poll(1.0))
    assert answer.request_id == packet.request_id
    client._unanswered[packet.request_id] = (0.0, packet)  # as if the answer had been lost

    def again() -> list[Packet]:
        assert server.receive(0.1) == []
        return client.poll(0.1)

    assert [answer.request_id for answer in arrived(again)] == [packet.request_id]


def test_no_answer_within_the_deadline_names_the_peer(server, client):
    start = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"the buffer at ipc.* within 0.3 s \(take\)"):
        client.call(Packet(kind="take"), 0.3)
    assert time.monotonic() - start < 20


def test_a_peer_that_is_gone_is_noticed_when_something_is_sent(server, client):
    client.post(Packet(kind="hello"))
    peer, packet = receive(server)
    assert server.answer(peer, echo(packet))
    client.close()
    end = time.monotonic() + 60.0
    while server.push(peer, Packet(kind="offer")):
        assert time.monotonic() < end, "the lost connection was never noticed"


@pytest.fixture
def stranger(address):
    """A raw socket at the server's door."""
    opened = zmq.Context.instance().socket(zmq.DEALER)
    opened.linger = 0
    opened.setsockopt(zmq.IDENTITY, b"stranger")
    opened.connect(address)
    yield opened
    opened.close()


def test_garbage_is_counted_and_gets_no_answer_and_the_server_goes_on(server, client, stranger):
    for frames in ([b"\xc1garbage"], [b""], [b"AG"], [b"x"] * 50):
        stranger.send_multipart(frames)
    client.post(Packet(kind="hello"))
    assert receive(server)[1].kind == "hello"
    arrived(lambda: [None] * (server.receive(0.1) == [] and server.num_refused >= 4))
    assert server.num_refused == 4
    assert stranger.poll(100) == 0


def test_a_request_damaged_on_its_way_is_repeated_by_its_sender(server, client, monkeypatch):
    monkeypatch.setattr(sockets, "RESEND_SECONDS", 0.0)
    sent = encode(Packet(kind="put", request_id=1, fields={"x": 1}))
    with monkeypatch.context() as damage:
        damage.setattr(sockets, "encode", lambda *_: [sent[0][:-1] + b"?"])
        client.post(Packet(kind="put", fields={"x": 1}))
    assert server.receive(0.2) == []
    client.poll(0.0)
    peer, packet = receive(server)
    assert (packet.kind, packet.fields) == ("put", {"x": 1})
    server._socket.send_multipart([peer.encode(), b"a damaged answer"])
    server.answer(peer, echo(packet))
    assert [answer.kind for answer in arrived(lambda: client.poll(1.0))] == ["echo"]


def test_another_version_is_told_so_but_a_flood_of_it_is_not_answered(
    server, stranger, monkeypatch
):
    monkeypatch.setattr(sockets, "NOTE_SECONDS", 30.0)
    (header,) = encode(Packet(kind="hello"))
    for _ in range(500):
        stranger.send(header[:2] + b"\x09" + header[3:])
    while server.receive(0.2) or server.num_refused < 500:
        pass
    answers = []
    while stranger.poll(200 if answers else 60_000):
        answers.append(decode(stranger.recv_multipart()))
    assert [answer.fields["reason"] for answer in answers] == [
        f"schema 9 is not {SCHEMA}; both sides need the same version"
    ]


def test_a_client_of_another_version_says_so(server, client, monkeypatch):
    client.post(Packet(kind="hello"))
    peer, packet = receive(server)
    (header,) = encode(echo(packet))
    server._socket.send_multipart([peer.encode(), header[:2] + b"\x09" + header[3:]])
    with pytest.raises(WireError, match="both sides need the same version"):
        client.poll(60.0)


def test_one_peer_cannot_keep_the_server_from_its_other_duties(server, stranger, client):
    client.post(Packet(kind="hello"))  # it is connected before the other begins
    peer, packet = receive(server)
    server.answer(peer, echo(packet))
    for _ in range(3 * sockets.MESSAGES_PER_TURN):
        stranger.send(b"x")
    client.post(Packet(kind="hello"))
    seen, turns = [], 0
    while not seen:
        before = server.num_refused
        seen, turns = server.receive(1.0), turns + 1
        assert server.num_refused - before <= sockets.MESSAGES_PER_TURN
    assert server.num_refused < 3 * sockets.MESSAGES_PER_TURN, "others had to wait for its end"


def test_a_turn_ends_after_so_many_bytes_and_the_next_goes_on_without_loss(server, client):
    half = "y" * (sockets.BYTES_PER_TURN // 2)
    for number in range(6):
        client.post(Packet(kind="put", fields={"number": number, "text": half}))
    turns = []
    while sum(map(len, turns)) < 6:
        turns.append(server.receive(5.0))
    assert max(map(len, turns)) <= 2
    assert [packet.fields["number"] for turn in turns for _, packet in turn] == list(range(6))


def test_a_frame_over_the_limit_ends_the_connection_before_it_is_received(address, monkeypatch):
    monkeypatch.setattr(sockets, "MAX_REQUEST_FRAME_BYTES", 4096)
    opened = Server(address)
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    stranger.connect(address)
    stranger.send(b"x" * 5000)
    assert monitor.poll(5000), "still connected"
    assert opened.receive(0.1) == []
    assert opened.num_refused == 0
    client = DealerClient(address, "actor-0", "the buffer")
    with pytest.raises(WireError, match=r"over the limit .* and 4096 in one"):
        client.post(Packet(kind="put", fields={"x": "y" * 5000}))
    client.post(Packet(kind="hello"))
    assert receive(opened)[1].kind == "hello"
    stranger.disable_monitor()
    for each in (stranger, client, opened):
        each.close()


def test_a_peer_that_never_reads_its_answers_counts_as_gone(address, monkeypatch):
    monkeypatch.setattr(sockets, "UNREAD_ANSWERS", 50)
    opened = Server(address)
    client = DealerClient(address, "actor-0", "the buffer")
    client._socket.rcvhwm = 1
    client.post(Packet(kind="hello"))
    peer, _ = receive(opened)
    sent = 0
    while opened.push(peer, Packet(kind="x", fields={"filler": "y" * 100_000})):
        sent += 1
        assert sent < 1000, "its answers pile up"
    assert sent >= 50
    assert opened.push(peer, Packet(kind="x")) is False
    client.close()
    opened.close()


def test_what_is_remembered_of_requests_is_bounded_and_the_oldest_is_forgotten(server, monkeypatch):
    monkeypatch.setattr(sockets, "REMEMBERED_ANSWERS", 5)
    monkeypatch.setattr(sockets, "REMEMBERED_OF_ALL", 8)

    def ask(peer, requests):
        for request in requests:
            server._answered_before(peer, Packet(kind="x", request_id=request))

    ask("one", range(1, 20))
    last = [("one", request) for request in range(15, 20)]
    assert list(server._answers) == last
    ask("two", range(1, 5))
    assert list(server._answers) == [*last[1:], *(("two", request) for request in range(1, 5))]


def test_what_the_server_refuses_is_raised_at_the_client(server, client):
    client.post(Packet(kind="dance"))
    peer, packet = receive(server)
    server.push(peer, Packet(kind="refused", request_id=packet.request_id, fields={"reason": "no"}))
    with pytest.raises(WireError, match=r"the buffer .* refused: no"):
        client.poll(5.0)


def test_an_address_in_use_is_refused_with_the_way_out(server, address):
    taken = Server("tcp://127.0.0.1:*")
    port = taken._socket.getsockopt(zmq.LAST_ENDPOINT).decode().rsplit(":", 1)[1]
    with pytest.raises(ConfigError, match=f"cannot listen on tcp://127.0.0.1:{port}.*another port"):
        Server(f"tcp://127.0.0.1:{port}")
    taken.close()


def test_frames_on_the_wire_are_plain_bytes():
    assert all(isinstance(frame, bytes | memoryview) for frame in encode(Packet(kind="x")))
