"""How processes divide the work, and how they find that they do not belong together."""

import pytest

from experiments import processes
from experiments.processes import Processes


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_each_piece_goes_to_one_process_and_no_process_has_too_much(count):
    sizes = [40, 3, 3, 3, 20, 1, 7, 7, 7, 13]
    shares = [Processes(k, count).share(sizes) for k in range(count)]
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[i] for i in share) for share in shares]
    # The bound of the greedy division: within the largest piece of an equal one.
    assert max(loads) <= sum(sizes) / count + max(sizes)
    if count == 2:
        assert abs(loads[0] - loads[1]) <= min(sizes) + 1


def test_one_process_does_everything_and_waits_for_nobody(tmp_path):
    alone = Processes()
    assert alone.first and alone.share([3, 1, 2]) == [0, 1, 2] and alone.share([]) == []
    alone.wait("a barrier")
    processes.check(alone, {"seed": 0}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("localhost:1", None, 2), "^process_id: got nothing, expected all of coordinator, "),
        ((None, 0, 2), "^coordinator: got nothing, expected all of"),
        (("localhost:1", 2, 2), "^process_id: got 2, expected 0 <= process_id < 2$"),
        (("localhost:1", -1, 2), "^process_id: got -1, expected 0 <= process_id < 2$"),
    ],
)
def test_half_an_address_is_an_error_before_anything_starts(given, text):
    with pytest.raises(ValueError, match=text):
        processes.start(*given)
