"""Which tokens a forward pass holds, in numbers of tokens alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmm_ray.service.fair_queue import FairQueue


@dataclass(frozen=True)
class Part:
    num_tokens: int
    num_branches: int


@dataclass(eq=False)
class Request:
    """A prefix, which can be cut anywhere, and branches, which cannot, as a packed question has them."""

    prefix: int
    branches: list[int]
    context_key: str = ""
    known: set[str] = field(default_factory=set)

    @property
    def tokens_left(self) -> int:
        return self.prefix + sum(self.branches)

    @property
    def is_cut(self) -> bool:
        return not self.branches

    @property
    def has_open_prefix(self) -> bool:
        return self.prefix >= 64 and self.context_key not in self.known

    def take(self, room: int, soft_room: int, is_first: bool) -> Part | None:
        if self.context_key in self.known:
            self.prefix = 0
        prefix = min(self.prefix, room)
        self.prefix -= prefix
        used, number = prefix, 0
        while not self.prefix and self.branches and used < room:
            if used + self.branches[0] > soft_room and not (is_first and used == 0):
                break
            used += self.branches.pop(0)
            number += 1
        return Part(used, number) if used else None


def run(queue: FairQueue[Request], budget: int) -> list[list[tuple[Request, int]]]:
    """The passes until the queue is empty, each with the tokens of each request."""
    passes = []
    while len(queue):
        pieces = queue.next_pass(budget)
        assert pieces, "a queue that holds requests gives a pass"
        passes.append([(work, piece.num_tokens) for work, piece in pieces])
    return passes


def test_a_short_request_goes_ahead_of_a_long_one_that_came_before() -> None:
    queue: FairQueue[Request] = FairQueue()
    long, short = Request(0, [500] * 64), Request(100, [200], "short")
    queue.add(long)
    queue.next_pass(512)
    assert queue.tokens_before(300) == 300  # not the long one's 31,500
    queue.add(short)
    first = queue.next_pass(512)
    assert (first[0][0], first[0][1].num_tokens) == (short, 300)
    assert len(queue) == 1


def test_many_short_requests_do_not_starve_a_long_one() -> None:
    queue: FairQueue[Request] = FairQueue()
    long = Request(0, [400] * 10)
    queue.add(long)
    num_passes = 0
    while not long.is_cut:
        queue.add(Request(0, [400]))
        queue.next_pass(400)
        num_passes += 1
        assert num_passes <= 200  # half of them go to head starts
    # Every pass that the long one has leaves one more short one behind, and of n that wait each gets an n-th.
    assert num_passes >= 30


def test_a_small_request_is_read_in_the_passes_that_its_own_size_takes() -> None:
    queue: FairQueue[Request] = FairQueue()
    long = Request(0, [100] * 200)
    queue.add(long)
    queue.next_pass(400)
    small = Request(1000, [100], "small")
    queue.add(small)
    # Without a head start every second pass would be the long one's.
    assert [queue.next_pass(400)[0][0] for _ in range(3)] == [small] * 3
    assert small.is_cut


def test_head_starts_take_a_large_request_nothing_that_is_left_over() -> None:
    queue: FairQueue[Request] = FairQueue()
    long = Request(0, [100] * 100)
    queue.add(long)
    num_passes = 0
    while not long.is_cut:
        # Small ones need seven tenths of what is read.
        if num_passes % 10 < 7:
            queue.add(Request(0, [400]))
        queue.next_pass(400)
        num_passes += 1
    # 10,000 tokens at 120 a pass take 84.
    assert num_passes <= 90


def test_what_is_not_small_has_no_head_start() -> None:
    queue: FairQueue[Request] = FairQueue()
    first, second = Request(0, [300] * 20), Request(0, [300] * 20)
    queue.add(first)
    queue.next_pass(600)
    queue.add(second)
    works = [work for _ in range(19) for work, _ in queue.next_pass(600)]
    assert works == [first] * 9 + [second] * 10


def test_requests_of_one_size_are_read_in_the_order_in_which_they_came() -> None:
    queue: FairQueue[Request] = FairQueue()
    requests = [Request(0, [100] * 8) for _ in range(4)]
    ends: list[int] = []
    for number in range(4):
        queue.add(requests[number])
    for number in range(1, 9):
        queue.next_pass(400)
        ends += [number] * (sum(request.is_cut for request in requests) - len(ends))
    # By equal shares all four would end with the eighth.
    assert ends == [2, 4, 6, 8]


def test_a_solution_longer_than_a_pass_gets_one_to_itself_in_its_turn() -> None:
    queue: FairQueue[Request] = FairQueue()
    huge = Request(0, [3000])
    queue.add(huge)
    queue.add(Request(0, [100] * 9))
    passes = run(queue, 512)
    assert [(huge, 3000)] in passes
    assert max(sum(tokens for _, tokens in one) for one in passes if one[0][0] is not huge) <= 640


def test_one_request_reads_a_prefix_and_those_with_the_same_wait_for_it() -> None:
    known: set[str] = set()
    queue: FairQueue[Request] = FairQueue()
    first, second = Request(1000, [50], "case", known), Request(1000, [50], "case", known)
    other = Request(100, [50], "other", known)
    for request in (first, second, other):
        queue.add(request)
    for _ in range(2):
        works = [work for work, _ in queue.next_pass(512)]
        assert second not in works
    known.add("case")
    passes = run(queue, 512)
    assert sum(tokens for one in passes for work, tokens in one if work is second) == 50


def test_the_next_one_reads_the_prefix_where_its_reader_goes_away() -> None:
    queue: FairQueue[Request] = FairQueue()
    first, second = Request(1000, [50], "case"), Request(1000, [50], "case")
    queue.add(first)
    queue.add(second)
    assert [work for work, _ in queue.next_pass(256)] == [first]
    queue.remove(first)
    assert [work for work, _ in queue.next_pass(256)] == [second]


def test_a_request_without_a_piece_is_refused() -> None:
    with pytest.raises(ValueError, match="without a piece"):
        FairQueue[Request]().add(Request(0, []))


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 900), st.lists(st.integers(1, 700), min_size=1, max_size=12)), min_size=1, max_size=12
    ),
    seed=st.integers(0, 1000),
)
def test_every_token_is_read_once_and_passes_are_full(sizes: Sequence[tuple[int, list[int]]], seed: int) -> None:
    queue: FairQueue[Request] = FairQueue()
    expected = [prefix + sum(branches) for prefix, branches in sizes]
    requests = [Request(prefix, list(branches), str(i)) for i, (prefix, branches) in enumerate(sizes)]
    waiting = list(requests)
    random.Random(seed).shuffle(waiting)
    read = dict.fromkeys(map(id, requests), 0)
    while waiting or len(queue):
        if waiting:
            queue.add(waiting.pop())
        pieces = queue.next_pass(512)
        total = sum(piece.num_tokens for _, piece in pieces)
        longest = max(max(branches) for _, branches in sizes)
        assert total <= max(640, longest)
        for work, piece in pieces:
            read[id(work)] += piece.num_tokens
    assert list(read.values()) == expected
    assert queue.num_tokens == 0
