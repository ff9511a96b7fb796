"""Scoring in forward passes that a caller puts together: requests come at any time and are cut into pieces that fit
what a pass has room for.

Enters: a `ScoringJob`, packed. Leaves: `RowPiece`s for `RewardModel.forward_pieces`, each as large as the caller
allows. The prefix of a question goes first, in as many pieces as it takes; where a `PrefixCache` knows its beginning,
that part is not read again.
"""

from medmm_ray.reward_model.forward import CachedPrefix, RowPiece
from medmm_ray.reward_model.packing import Branch, PackedQuestion
from medmm_ray.reward_model.prefix_cache import BLOCK, PrefixCache, PrefixIds
from medmm_ray.reward_model.scoring_job import ScoringJob


class PieceCutter:
    """One request's pieces, in the order in which they must be read.

    `salt` tells prefixes of equal ids apart (`PrefixIds`).
    """

    def __init__(self, job: ScoringJob, prefixes: PrefixCache, salt: str = "") -> None:
        self.job = job
        self._prefixes = prefixes
        # Last first, so that one that is done is popped.
        self._groups = [_Group(group, prefixes, salt) for group in reversed(job.packing.groups)]
        num_known = sum(group.num_known for group in self._groups)
        self._tokens_left = job.packing.num_tokens - num_known
        self._prefix_ids = {id(group.packed): group.prefix_ids for group in self._groups}

    @property
    def tokens_left(self) -> int:
        """Tokens that no piece has had yet, without those of prefixes that the cache knew when the request came."""
        return self._tokens_left

    @property
    def is_cut(self) -> bool:
        """Whether every piece was given out."""
        return not self._groups

    @property
    def has_open_prefix(self) -> bool:
        """Whether a prefix is to be read of which the cache does not know enough now."""
        return bool(self._groups) and self._groups[-1].num_unknown(self._prefixes) >= BLOCK

    def take(self, room: int, soft_room: int, is_first: bool) -> RowPiece | None:
        """The next piece for a pass that has `room` tokens left; None where nothing fits.

        A prefix is cut to fit; a branch is not: it starts within `room` and ends within `soft_room`, or is longer than
        a pass and has it alone (`is_first`: nothing is in the pass yet).
        """
        # As late as this: others of the same case may have read the prefix while this one waited.
        group = self._groups[-1]
        self._tokens_left -= group.look_up(self._prefixes)
        piece = group.take(self.job, room, soft_room, is_first)
        if piece is not None:
            self._tokens_left -= piece.num_tokens
            if not group.branches:
                self._groups.pop()
        return piece

    def keep_prefix(self, piece: RowPiece) -> None:
        """Put the prefix of a piece that was read into the cache, where the piece had the last of it."""
        if piece.cached is not None and piece.has_prefix and piece.stop == len(piece.packed.prefix_ids):
            self._prefixes.add(self._prefix_ids[id(piece.packed)], piece.cached)


class _Group:
    """What was not read yet of solutions that share a prefix: the prefix from `start` on, and `branches`, the shortest
    last."""

    def __init__(self, packed: PackedQuestion, prefixes: PrefixCache, salt: str) -> None:
        self.packed = packed
        self.prefix_ids = PrefixIds(packed.prefix_ids, salt)
        self.num_known = prefixes.known_length(self.prefix_ids)
        # Neighbours of like length make a batch for the attention.
        self.branches = sorted(packed.branches, key=lambda branch: -len(branch.ids))
        self.start = 0
        self.cached: CachedPrefix | None = None

    @property
    def num_prefix(self) -> int:
        """Tokens of the prefix."""
        return len(self.packed.prefix_ids)

    def num_unknown(self, prefixes: PrefixCache) -> int:
        """Tokens of the prefix that are to be read, as far as is known now."""
        if self.cached is not None:
            return self.num_prefix - self.start
        return self.num_prefix - prefixes.known_length(self.prefix_ids)

    def look_up(self, prefixes: PrefixCache) -> int:
        """Start behind what the cache knows, once; gives how many more tokens that are than when the request came."""
        if self.cached is not None:
            return 0
        self.start, self.cached = prefixes.longest(self.prefix_ids)
        return self.start - self.num_known

    def take(self, job: ScoringJob, room: int, soft_room: int, is_first: bool) -> RowPiece | None:
        """The next piece, or None where nothing fits."""
        start = self.start
        # As much of the prefix as fits; branches only behind the whole of it.
        stop = min(self.num_prefix, start + max(room, 0))
        branches: list[Branch] = []
        if stop == self.num_prefix:
            branches = self._take_branches(stop - start, room, soft_room, is_first)
        if not branches and stop == start:
            return None
        self.start = stop
        # A short prefix that is read with all its branches is needed nowhere else.
        is_whole = start == 0 and not self.branches and self.num_prefix < BLOCK
        return RowPiece(job, self.packed, branches, start, stop, None if is_whole else self.cached)

    def _take_branches(self, used: int, room: int, soft_room: int, is_first: bool) -> list[Branch]:
        """As many branches as fit behind `used` tokens of the prefix."""
        taken: list[Branch] = []
        rest: list[Branch] = []
        for branch in self.branches:
            is_alone = is_first and used == 0
            if used < room and (is_alone or used + len(branch.ids) <= soft_room):
                taken.append(branch)
                used += len(branch.ids)
            else:
                rest.append(branch)
        self.branches = rest
        return taken
