"""Real sockets: requests take effect once, peers that are gone are noticed, deadlines hold."""

from __future__ import annotations

import threading
import time

import pytest
import zmq

from asyncgrpo.errors import ConfigError, PeerTimeout, WireError
from asyncgrpo.wire import sockets
from asyncgrpo.wire.codec import Packet, encode
from asyncgrpo.wire.sockets import DealerClient, Server


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


def receive(server: Server) -> tuple[str, Packet]:
    ((peer, packet),) = server.receive(5.0)
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


def test_a_repeated_request_is_answered_again_but_handed_out_once(server, client, monkeypatch):
    monkeypatch.setattr(sockets, "RESEND_SECONDS", 0.0)
    client.post(Packet(kind="put"))
    peer, packet = receive(server)
    client.poll(0.0)  # repeats it: the answer is late
    assert server.receive(0.2) == []
    server.answer(peer, echo(packet))
    (answer,) = client.poll(5.0)
    assert answer.request_id == packet.request_id
    client._unanswered[packet.request_id] = (0.0, packet)  # as if the answer had been lost
    client.poll(0.0)
    assert server.receive(0.5) == []
    assert [again.request_id for again in client.poll(5.0)] == [packet.request_id]


def test_no_answer_within_the_deadline_names_the_peer(server, client):
    start = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"the buffer at ipc.* within 0.3 s \(take\)"):
        client.call(Packet(kind="take"), 0.3)
    assert time.monotonic() - start < 2.0


def test_a_peer_that_is_gone_is_noticed_when_something_is_sent(server, client):
    client.post(Packet(kind="hello"))
    peer, packet = receive(server)
    assert server.answer(peer, echo(packet))
    client.close()
    end = time.monotonic() + 5.0
    while server.push(peer, Packet(kind="offer")):
        assert time.monotonic() < end, "the lost connection was never noticed"


def test_garbage_is_refused_to_its_sender_and_the_server_goes_on(server, client, address):
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(address)
    stranger.send_multipart([b"\xc1garbage"])
    assert server.receive(1.0) == []
    client.post(Packet(kind="hello"))
    assert receive(server)[1].kind == "hello"
    stranger.close()


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
