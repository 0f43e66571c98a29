"""States after prefixes that prompts have in common, so that these are read once.

The state of an SSM is of constant size whatever it has read: a prefix of any length is kept in the bytes of one slot. A
prefix is known by a hash of its tokens, and of what else its states depend on (`made_by`: how the ranks' sums travel).
What is worth keeping shows when a second prompt begins as an earlier one did: reading is cut where they part, at a
multiple of GRANULE, and the state there is kept. A whole prompt may be too.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GRANULE = 64  # tokens
MOST_SEEN = 1 << 16  # prefixes of earlier prompts that are remembered, without states

Key = tuple[int, bytes]  # a prefix: its length and the hash of its tokens


@dataclass(frozen=True)
class Snapshot:
    """A slot's states on this rank: conv and ssm [layers, ..]."""

    conv: torch.Tensor
    ssm: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes


@dataclass
class PrefixCounts:
    """Of prompts since the start: how many began with a kept prefix, or not, and tokens that were not read again."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0


class PrefixCache:
    """Kept states, the least recently used first to go. Every rank keeps its part, and decides alike.

    Args:
        budget: bytes of all snapshots on a rank.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.counts, self.nbytes = budget, PrefixCounts(), 0
        self._kept: OrderedDict[Key, Snapshot] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, prompt: Sequence[int], made_by: str = "") -> tuple[int, Snapshot | None]:
        """The longest kept prefix of `prompt` that leaves a token to read: its length and states; 0 and None."""
        keys = self._keys(prompt, made_by, {length for length, _ in self._kept if length < len(prompt)})
        key = next((key for key in reversed(keys) if key in self._kept), None)
        if key is None:
            self.counts.misses += 1
            return 0, None
        self._kept.move_to_end(key)
        self.counts.hits, self.counts.tokens = self.counts.hits + 1, self.counts.tokens + key[0]
        return key[0], self._kept[key]

    def parting(self, prompt: Sequence[int], known: int, made_by: str = "") -> int:
        """Where `prompt` parts from all earlier ones, a multiple of GRANULE, if that is behind its first `known`
        tokens; else 0. It is an earlier one from now on."""
        keys = self._keys(prompt, made_by, range(GRANULE, len(prompt), GRANULE))
        shared = next((length for length, digest in reversed(keys) if (length, digest) in self._seen), 0)
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return shared if shared > known else 0

    def keep(self, prefix: Sequence[int], snapshot: Snapshot, made_by: str = "") -> None:
        """Keep the states after `prefix`, and let go of others for which there is no room; nothing if it is too big."""
        if snapshot.nbytes > self.budget:
            return
        [key] = self._keys(prefix, made_by, [len(prefix)])
        before = self._kept.pop(key, None)
        self.nbytes += snapshot.nbytes - (before.nbytes if before else 0)
        self._kept[key] = snapshot
        while self.nbytes > self.budget:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    @staticmethod
    def _keys(prompt: Sequence[int], made_by: str, lengths: Sequence[int] | set[int] | range) -> list[Key]:
        """Of its prefixes of these lengths, the shortest first."""
        salt = hashlib.blake2b(made_by.encode(), digest_size=16).digest()
        hashed, keys, begin = hashlib.blake2b(salt=salt, digest_size=16), [], 0
        for length in sorted(lengths):
            hashed.update(array("q", prompt[begin:length]).tobytes())
            keys.append((length, hashed.digest()))
            begin = length
        return keys
