"""Messages, errors and end of a child process."""

from __future__ import annotations

import os
import time

import pytest

from skipkv_vllm.evaluation import RunError
from skipkv_vllm.evaluation.children import Child, Finished, attended


def double(connection, log):
    with attended(connection, log):
        while (numbers := connection.recv()) is not None:
            for number in numbers:
                print(f"doubling {number}")
                connection.send(2 * number)
            connection.send(Finished())


def fail(connection, log):
    with attended(connection, log):
        raise ValueError("no such model")


def die(connection, log):
    log.write_text("out of memory\n")
    os._exit(9)


def hang(connection, log):
    with attended(connection, log):
        connection.send("ready")
        time.sleep(600)


def test_a_child_answers_and_ends(tmp_path):
    log = tmp_path / "log"
    child = Child(double, (log,), log)
    child.connection.send([3, 4])
    assert [child.receive() for _ in range(3)] == [6, 8, Finished()]
    child.ask_to_end()
    child.end(patience=20)
    assert child._process.exitcode == 0
    assert log.read_text() == "doubling 3\ndoubling 4\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [(fail, "an engine failed: ValueError: no such model"), (die, "an engine died.*\nout of memory")],
)
def test_errors_of_a_child_reach_the_parent(tmp_path, body, message):
    log = tmp_path / "log"
    child = Child(body, (log,), log)
    with pytest.raises(RunError, match=message):
        child.receive()
    child.end(patience=5)


def test_a_child_that_does_not_end_is_ended(tmp_path):
    log = tmp_path / "log"
    child = Child(hang, (log,), log)
    assert child.receive() == "ready"
    child.end(patience=0)
    assert child._process.exitcode != 0
