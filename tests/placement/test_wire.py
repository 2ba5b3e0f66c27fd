"""Messages between ranks: what arrives, in which order, and what waits."""

import numpy as np
import pytest
import torch
from sameness import same
from wires import two_wires

from vla.placement.wire import CALLS, EXPERIENCE, SMALL, STEPS, WAITING_BYTES, WAITING_MESSAGES, size_of


@pytest.fixture(scope="module")
def wires():
    return two_wires()


def test_values_arrive_as_they_were_sent(wires):
    first, second = wires
    large = torch.arange(SMALL, dtype=torch.int64).view(2, -1)
    value = {
        "texts": ["put carrot on plate", None, True, 0.1],
        "large": large.t(),  # not contiguous
        "small": (torch.tensor([True, False]), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 7)),
        "array": np.float32([[1.0, np.nan]]),
        "long": ["x" * 5000],
    }
    first.send(value, 1, CALLS)
    large.zero_()  # what was sent is what it was then
    got = second.receive(0, CALLS)
    assert got["texts"] == value["texts"] and got["long"] == value["long"]
    assert torch.equal(got["large"], torch.arange(SMALL).view(2, -1).t())
    assert same(got["small"], value["small"]) and [t.dtype for t in got["small"]] == [t.dtype for t in value["small"]]
    assert isinstance(got["array"], np.ndarray) and np.array_equal(got["array"], value["array"], equal_nan=True)


def test_channels_keep_their_order_and_do_not_wait_for_each_other(wires):
    first, second = wires
    for number in range(3):
        first.send(["calls", number], 1, CALLS)
    first.send("experience", 1, EXPERIENCE)
    second.send("back", 0, CALLS)
    assert second.receive(0, EXPERIENCE) == "experience" and first.receive(1, CALLS) == "back"
    assert [second.receive(0, CALLS) for _ in range(3)] == [["calls", number] for number in range(3)]


def test_ten_thousand_messages_keep_little_in_memory(wires):
    first, second = wires
    for number in range(10_000):
        first.send([number, torch.full((100,), number)], 1, STEPS)
        waiting = first.waiting[1, STEPS]
        assert len(waiting) <= WAITING_MESSAGES and size_of(waiting) <= WAITING_BYTES
        if number % WAITING_MESSAGES == WAITING_MESSAGES - 1:  # as many as wait before send() does
            for expected in range(number - WAITING_MESSAGES + 1, number + 1):
                got, tensor = second.receive(0, STEPS)
                assert got == expected and torch.equal(tensor, torch.full((100,), expected))
    left = 10_000 % WAITING_MESSAGES
    assert [second.receive(0, STEPS)[0] for _ in range(left)] == list(range(10_000 - left, 10_000))
    first.flush(STEPS)
    assert not first.waiting[1, STEPS]


def test_bytes_are_counted_where_they_arrive(wires):
    first, second = wires
    second.pop_counts()
    first.send(torch.zeros(2 * SMALL, dtype=torch.uint8), 1, EXPERIENCE)
    second.receive(0, EXPERIENCE)
    counts = second.pop_counts()
    assert counts.keys() == {"bytes_experience", "seconds_experience"}
    assert 2 * SMALL < counts["bytes_experience"] < 2 * SMALL + 200 and counts["seconds_experience"] > 0
    assert not second.pop_counts()
