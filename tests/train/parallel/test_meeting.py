"""Processes of a run meet, compare and end together; here each is a thread."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mdn_jax.errors import RunError
from tests.train.helpers import tiny_config
from train.config_sections import DistributedConfig
from train.guard import DivergedError
from train.parallel import distributed, lifeline, meeting
from train.parallel.distributed import check_alike, check_configuration, together
from train.parallel.meeting import Hub, Spoke
from train.parallel.relay import free_port, open_relay

WAIT = 20.0


@pytest.fixture
def ended(monkeypatch):
    """Exit statuses of processes that end where they are."""
    statuses = []
    monkeypatch.setattr(lifeline, "leave_now", statuses.append)
    monkeypatch.setattr(lifeline, "_PATIENCE", 0.1)
    monkeypatch.setattr(lifeline, "_UNWIND", 0.3)
    monkeypatch.setattr(lifeline, "_SETTLE", 0.1)
    return statuses


def in_turn(*calls):
    """Results or errors of calls made at the same time."""

    def outcome(call):
        try:
            return call()
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(outcome, calls))


@contextlib.contextmanager
def met(count):
    port = free_port()
    spokes = [lambda i=i: Spoke("localhost", port, i, count, wait=WAIT) for i in range(1, count)]
    ends = in_turn(lambda: Hub(port, count, wait=WAIT), *spokes)
    assert not any(isinstance(end, str) for end in ends), ends
    try:
        yield ends
    finally:
        for end in ends:
            end.leaving = True
        ends[0].close()


def eventually(condition):
    end = time.monotonic() + WAIT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_processes_of_a_cluster_are_found(monkeypatch):
    with pytest.raises(RunError, match="name them with --distributed"):
        distributed._find(DistributedConfig(enabled=True))
    slurm = {"JOB_ID": "7", "NTASKS": "4", "PROCID": "3", "LOCALID": "1"}
    for name, value in (slurm | {"STEP_NODELIST": "node[1-2]"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    address, count, index = distributed._find(DistributedConfig(enabled=True))
    assert address.startswith("node1:")
    assert (count, index) == (4, 3)


@pytest.mark.parametrize("address", ["nowhere", "nowhere:", ":1", "nowhere:http", "nowhere:70000"])
def test_an_address_that_is_none(address):
    config = DistributedConfig(coordinator=address, processes=2, index=1)
    with pytest.raises(RunError, match="expected HOST:PORT, got"):
        distributed._start(config)


def test_all_get_what_each_brings():
    with met(3) as ends:
        for turn in range(2):
            calls = [lambda e=e, t=turn: e.gather({"from": [e.index, t]}) for e in ends]
            assert in_turn(*calls) == 3 * [[{"from": [i, turn]} for i in range(3)]]


def test_an_address_where_nobody_is(capsys, monkeypatch):
    monkeypatch.setattr(meeting, "_SAY_EVERY", 0.3)
    port = free_port()
    with pytest.raises(RunError) as raised:
        Spoke("localhost", port, 1, 2, wait=1.5)
    assert f"process 0 to answer at localhost:{port} within 1.5 s" in str(raised.value)
    assert "refused" in str(raised.value)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(f"waiting for process 0 at localhost:{port}" in line for line in lines)
    assert all("s passed" in line and "s left" in line for line in lines)


def test_processes_that_do_not_come_are_named_everywhere():
    port = free_port()
    answers = in_turn(
        lambda: Hub(port, 4, wait=1.5), lambda: Spoke("localhost", port, 2, 4, wait=WAIT)
    )
    assert "missing: 1, 3" in answers[0]
    assert answers == answers[:1] * 2


@pytest.mark.parametrize(
    ("second", "expected"),
    [((1, 3), "distributed.index: expected each index"), ((2, 5), "distributed.processes: exp")],
)
def test_processes_that_do_not_fit_end_the_meeting(second, expected, monkeypatch):
    port, admit, first = free_port(), Hub._admit, threading.Event()

    def admit_and_tell(*arguments):
        refusal = admit(*arguments)
        first.set()
        return refusal

    monkeypatch.setattr(Hub, "_admit", admit_and_tell)

    def late():
        assert first.wait(WAIT)
        return Spoke("localhost", port, *second, wait=WAIT)

    answers = in_turn(
        lambda: Hub(port, 3, wait=WAIT), lambda: Spoke("localhost", port, 1, 3, wait=WAIT), late
    )
    assert all(answer.startswith(expected) for answer in answers), answers


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"listen on, got {port}"):
            Hub(port, 2, wait=WAIT)


def test_another_program_at_the_address():
    with socket.create_server(("localhost", 0)) as other:

        def answer():
            connected, _ = other.accept()
            with connected:
                connected.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RunError, match=r"distributed.coordinator: expected process 0 of"):
            Spoke("localhost", other.getsockname()[1], 1, 2, wait=WAIT)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b"\xff" * 5000, b""])
def test_strangers_do_not_disturb_a_meeting(words):
    port = free_port()

    def stranger():
        time.sleep(0.1)
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as there:
            there.sendall(words)

    def late():
        time.sleep(0.3)
        return Spoke("localhost", port, 1, 2, wait=WAIT)

    hub, _, spoke = in_turn(lambda: Hub(port, 2, wait=WAIT), stranger, late)
    assert in_turn(lambda: hub.gather(5), lambda: spoke.gather(7)) == [[5, 7], [5, 7]]
    hub.leaving = spoke.leaving = True
    hub.close()


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_is_raised_where_others_compare(failing, ended):
    with met(3) as ends:
        others = [end for end in ends if end.index != failing]

        def fail():
            error = RunError("data.files: expected a file, got none")
            assert ends[failing].settle(error, str(error)) == str(error)

        answers = in_turn(fail, *[lambda e=e: e.gather(1) for e in others])
        assert answers[1:] == 2 * [f"process {failing}: data.files: expected a file, got none"]
        assert eventually(lambda: ended == [1, 1])  # nobody went on to end by themselves


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_those_that_wait_for_a_device(killed, ended, capsys):
    with met(3) as ends:
        if killed:
            ends[killed]._connection.close()
        else:
            ends[0].leaving = True
            for connection in ends[0]._members.values():
                connection.close()
        ends[killed].leaving = True
        assert eventually(lambda: len(ended) >= 2)
        assert set(ended) == {1}
        said = [x for x in capsys.readouterr().err.splitlines() if x]
        assert all(x.startswith(f"python -m train: error: process {killed} on ") for x in said)
        assert all("was killed" in x for x in said)


def test_an_error_that_came_of_another_process_is_told_as_that(ended):
    with met(2) as (hub, spoke):
        first = RunError("checkpoint: expected room, got none")
        spoke.settle(first, str(first))
        assert eventually(lambda: hub.failure is not None)
        gloo = ValueError("Gloo: connection closed by peer")
        assert hub.settle(gloo, str(gloo)) == f"process 1: {first}"


def test_what_is_raised_in_a_run_is_told(ended, monkeypatch, capsys):
    with met(2) as (hub, spoke):
        monkeypatch.setattr(distributed, "_lifeline", spoke)
        with pytest.raises(RunError, match=r"^ValueError: odd$"), together(), together():
            raise ValueError("odd\nand long")
        assert capsys.readouterr().err.count("Traceback") == 1
        assert eventually(lambda: hub.failure == "process 1: ValueError: odd")


@pytest.mark.parametrize("error", [DivergedError("guard: a spike", step=3), KeyboardInterrupt()])
def test_what_the_command_knows_is_raised_as_it_is(error, ended, monkeypatch):
    with met(2) as (hub, spoke):
        monkeypatch.setattr(distributed, "_lifeline", hub)
        with pytest.raises(type(error)) as raised, together():
            raise error
        assert raised.value is error
        said = "guard: a spike" if str(error) else "interrupted"
        assert eventually(lambda: spoke.failure == f"process 0: {said}")


def test_a_relay_stays_open_when_the_service_goes():
    with met(2) as (hub, spoke), socket.create_server(("127.0.0.1", hub.service)) as service:
        port = hub._listener.getsockname()[1]
        local = open_relay("localhost", port, leaving=lambda: spoke.leaving)
        with socket.create_connection(("127.0.0.1", local)) as client:
            client.sendall(b"to the service")
            there, _ = service.accept()
            assert there.recv(100) == b"to the service"
            there.sendall(b"and back")
            assert client.recv(100) == b"and back"
            there.close()
            client.settimeout(0.2)
            for _ in range(2):
                client.sendall(b"still there?")
                time.sleep(0.1)
            with pytest.raises(TimeoutError):  # and not the end of the connection
                client.recv(1)


def test_what_differs_is_named_with_its_process(monkeypatch):
    monkeypatch.setattr(distributed, "from_all", lambda mine: [mine, mine, mine | {"b": 3, "c": 0}])
    with pytest.raises(RunError) as raised:
        check_alike("flags", {"a": 1, "b": 2})
    assert str(raised.value) == (
        "b: expected the same flags in every process, got 2 in process 0 and 3 in process 2 "
        "(and 1 more)"
    )
    check_alike("flags", {"b": 3, "c": 0})


@pytest.mark.parametrize(
    ("flag", "fits"), [("seed", False), ("data.files", True), ("model.hidden_size", False)]
)
def test_flags_that_may_differ(flag, fits, corpus, tmp_path, monkeypatch):
    def from_all(mine):
        return [mine, mine | {flag: "other"} if flag in mine else mine]

    monkeypatch.setattr(distributed, "from_all", from_all)
    with contextlib.nullcontext() if fits else pytest.raises(RunError, match=f"^{flag}: expected"):
        check_configuration(tiny_config(corpus, tmp_path).resolved())
