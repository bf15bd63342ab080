"""Global stream positions -> batches of sources that are read from their text: the same for every number of ranks.

Every rank reads all text and keeps its own blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from dist_cpt.data.batch import Batch
from dist_cpt.data.loader import PADDING, BatchBuilder, BlockLoader, PackedTokens
from dist_cpt.data.mixture import mixture_of
from dist_cpt.data.packing import document_lengths
from dist_cpt.data.prepared import Prepared
from dist_cpt.data.stream import SourceStream
from dist_cpt.run_folder.train_state import Mark

_ID_BITS = 52  # which every reader of JSON keeps


class StreamLoader:
    """The training stream: position -> source by weight -> block by its number in the source's stream."""

    def __init__(
        self, prepared: Prepared, streams: Mapping[str, SourceStream], pad_id: int, first_position: int = 0
    ) -> None:
        self.source_names = [source.name for source in prepared.streamed]
        self.mixture = mixture_of(prepared, [(1, 1)] * len(prepared.streamed))
        self.first_position = first_position
        self.sizes: list[tuple[int, int]] = []  # unknown before the text is read
        self.available: list[int] = []
        self._seq_len, self._pad_id = prepared.seq_len, pad_id
        self._by_name = streams
        self._streams = [streams[name] for name in self.source_names]

    def with_data(self, prepared: Prepared) -> StreamLoader:
        """The stream of other weights, or of some of the sources."""
        return StreamLoader(prepared, self._by_name, self._pad_id, self.first_position)

    def block_id(self, position: int) -> tuple[int, int, int]:
        """(source, epoch, a hash of the block's tokens) at a position of the stream."""
        source, number = self.mixture(position)
        placed, block = self._streams[source].block(number)
        window, digest = placed.window, hashlib.sha256()
        for document, start, length in window.plan.block(block):
            first = window.start_of(document) + start
            digest.update(length.to_bytes(8, "little"))
            digest.update(window.tokens[first : first + length].astype("<i4").tobytes())
        return source, placed.mark.epoch, int.from_bytes(digest.digest()[:8], "little") >> (64 - _ID_BITS)

    def document_lengths(self, position: int) -> list[int]:
        """As `BlockLoader.document_lengths`; errors as `SourceStream.block`."""
        source, number = self.mixture(position)
        placed, block = self._streams[source].block(number)
        return document_lengths(placed.window.plan, block)

    def batch(self, positions: Sequence[int]) -> Batch:
        """As `BlockLoader.batch`; errors as `SourceStream.block`."""
        builder = BatchBuilder(len(positions), self._seq_len, self._pad_id, len(self._streams))
        for position in positions:
            if position == PADDING:
                builder.add_padding()
            else:
                source, number = self.mixture(position)
                placed, block = self._streams[source].block(number)
                builder.add(PackedTokens(placed.window, placed.window.plan, True), block, source)
        return builder.build(positions)

    def blocks_read(self, num_blocks: int) -> dict[str, int]:
        """How many of the first `num_blocks` of the stream are of each source."""
        return dict(zip(self.source_names, self.mixture.counts_before(num_blocks).tolist(), strict=True))

    def epochs(self, num_blocks: int) -> dict[str, float]:
        """Empty: how often a run goes through a source is unknown before its text is read."""
        return {}

    def epochs_read(self, position: int) -> dict[str, float]:
        """How often each source has been read before a position, as `SourceStream.epochs`."""
        counts = self.blocks_read(position).items()
        return {name: stream.epochs(count) for (name, count), stream in zip(counts, self._streams, strict=True)}

    def marks(self, position: int) -> dict[str, Mark]:
        """By source the shard with its next block at a position: what a resume needs to find it."""
        counts = self.blocks_read(position).items()
        return {name: stream.mark_of(count) for (name, count), stream in zip(counts, self._streams, strict=True)}

    def learn(self, marks: Mapping[str, Mark]) -> None:
        """Take over the marks that a checkpoint recorded."""
        for name, stream in zip(self.source_names, self._streams, strict=True):
            if name in marks:
                stream.learn(marks[name])

    def forget_before(self, position: int) -> None:
        """Allow what precedes a position to be dropped: only a rollback asks for it again."""
        for number, stream in zip(self.mixture.counts_before(position).tolist(), self._streams, strict=True):
            stream.forget_before(number)

    def close(self) -> None:
        """Stop reading."""
        for stream in self._streams:
            stream.close()


Loader = BlockLoader | StreamLoader
