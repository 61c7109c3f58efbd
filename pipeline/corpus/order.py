"""The order of training: which samples make up global batch k, and who computes which of them.

Ray Data has no resumable training iterator (ray#37633), so the position of a run is one number, k, and a batch is a
pure function of (lengths, seed, k). An interrupted run goes on at k; a run on another number of workers sees the same
global batches.

The endless sequence. Epoch e is a permutation of all samples, drawn from the counter-based generator Philox (Salmon et
al., SC 2011) under the key (seed, e); epochs follow one another without a gap, and batch k takes the positions
[k*S, (k+1)*S). The permutation comes from sorting raw 64-bit draws, not from `Generator.permutation`: NumPy promises
the raw stream for ever, but not the algorithms of `Generator` (NEP 19).

Like lengths. Padding is wasted work, so the whole batches of an epoch are taken in windows of 16; the samples of a
window are sorted by length and cut into batches, which are shuffled again. Only the batch that straddles two epochs
stays mixed. Within an epoch every sample still comes exactly once.

Slots. A global batch is dealt to workers x micro-batches longest first, round robin, so that the micro-batches that run
at the same time are alike. Every rank gets the same number of micro-batches of the same number of slots, because ranks
that disagree on the number of collective calls deadlock; an empty slot is `EMPTY_SLOT`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW_BATCHES = 16
EMPTY_SLOT = -1
_CACHED_EPOCHS = 2  # a batch may straddle two epochs
_UINT64 = 2**64


def sequences_per_batch(batch_tokens: int, lengths: NDArray[np.integer]) -> int:
    """Number of samples whose expected total length is `batch_tokens`, at least 1.

    Args:
        batch_tokens: wanted tokens (prompt and response) in a global batch.
        lengths: prompt + response length of every sample, in tokens.

    Raises:
        ValueError: no samples, or `batch_tokens` < 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if len(lengths) == 0:
        raise ValueError("no samples: the corpus is empty")
    return max(1, round(batch_tokens / float(np.mean(lengths))))


class BatchOrder:
    """Global batches of exactly S samples, by number: a function of (lengths, seed, k) and of nothing else.

    Args:
        prompt_lengths: [samples] tokens in each prompt.
        response_lengths: [samples] tokens in each response.
        sequences_per_batch: S, samples in a global batch; may exceed the corpus (a batch then spans epochs).
        seed: 0 <= seed < 2**64.

    Raises:
        ValueError: an empty corpus, lengths that do not match, or S or the seed out of range.
    """

    def __init__(
        self,
        prompt_lengths: NDArray[np.integer] | Sequence[int],
        response_lengths: NDArray[np.integer] | Sequence[int],
        sequences_per_batch: int,
        seed: int,
    ) -> None:
        self.prompt_lengths = np.asarray(prompt_lengths, dtype=np.int64)
        self.response_lengths = np.asarray(response_lengths, dtype=np.int64)
        if self.prompt_lengths.ndim != 1 or self.prompt_lengths.shape != self.response_lengths.shape:
            raise ValueError(
                f"prompt_lengths {self.prompt_lengths.shape} and response_lengths {self.response_lengths.shape} "
                "must be two vectors of the same length"
            )
        if len(self.prompt_lengths) == 0:
            raise ValueError("no samples: the corpus is empty")
        if sequences_per_batch < 1:
            raise ValueError(f"sequences_per_batch must be at least 1, got {sequences_per_batch}")
        if not 0 <= seed < _UINT64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.lengths = self.prompt_lengths + self.response_lengths
        self.sequences_per_batch = sequences_per_batch
        self.seed = seed
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.lengths)

    def batch(self, k: int) -> NDArray[np.int64]:
        """[S] sample numbers of global batch k, k >= 0."""
        if k < 0:
            raise ValueError(f"batch numbers start at 0, got {k}")
        size, samples = self.sequences_per_batch, len(self)
        position, end = k * size, (k + 1) * size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, samples)
            take = min(end - position, samples - offset)
            pieces.append(self.epoch(epoch)[offset : offset + take])
            position += take
        return pieces[0].copy() if len(pieces) == 1 else np.concatenate(pieces)

    def epoch(self, e: int) -> NDArray[np.int64]:
        """[samples] sample numbers of epoch e in the order they are used, each exactly once. Read-only."""
        cached = self._epochs.get(e)
        if cached is None:
            cached = self._order_epoch(e)
            cached.setflags(write=False)
            self._epochs[e] = cached
            while len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        else:
            self._epochs.move_to_end(e)
        return cached

    def response_tokens(self, k: int) -> int:
        """Response tokens in global batch k: the exact divisor of the summed loss."""
        return int(self.response_lengths[self.batch(k)].sum())

    def total_tokens(self, k: int) -> int:
        """Prompt and response tokens in global batch k, without padding."""
        return int(self.lengths[self.batch(k)].sum())

    def micro_batches(self, workers: int, micro_batch: int) -> int:
        """Micro-batches of `micro_batch` slots that each of `workers` ranks computes per global batch."""
        if workers < 1 or micro_batch < 1:
            raise ValueError(f"workers and micro_batch must be at least 1, got {workers} and {micro_batch}")
        return -(-self.sequences_per_batch // (workers * micro_batch))

    def slots(self, k: int, workers: int, micro_batch: int, rank: int) -> list[NDArray[np.int64]]:
        """The micro-batches of one rank for global batch k: arrays [micro_batch] of sample numbers or `EMPTY_SLOT`.

        All ranks together hold every sample of `batch(k)` exactly once. The samples are spread evenly over the
        micro-batches, so a rank gets one without any sample only if there are fewer samples than micro-batches.
        """
        if not 0 <= rank < workers:
            raise ValueError(f"rank must be in [0, {workers}), got {rank}")
        count = self.micro_batches(workers, micro_batch)
        samples = self.batch(k)
        longest_first = samples[np.argsort(-self.lengths[samples], kind="stable")]
        mine = []
        for together in np.array_split(longest_first, count):
            slots = np.full(micro_batch, EMPTY_SLOT, dtype=np.int64)
            dealt = together[rank::workers]
            slots[: len(dealt)] = dealt
            mine.append(slots)
        return mine

    def _order_epoch(self, e: int) -> NDArray[np.int64]:
        samples, size = len(self), self.sequences_per_batch
        head = -(e * samples) % size  # positions that complete the batch begun in the epoch before
        batches = max(0, samples - head) // size
        draws = np.random.Philox(key=np.array([self.seed, e], dtype=np.uint64)).random_raw(samples + batches)
        order = np.argsort(draws[:samples], kind="stable")
        whole = order[head : head + batches * size].reshape(batches, size)
        shuffle = draws[samples:]
        for start in range(0, batches, WINDOW_BATCHES):
            window = whole[start : start + WINDOW_BATCHES]
            members = window.reshape(-1)
            by_length = members[np.argsort(self.lengths[members], kind="stable")].reshape(window.shape)
            window[:] = by_length[np.argsort(shuffle[start : start + WINDOW_BATCHES], kind="stable")]
        return order
