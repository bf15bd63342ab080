"""The tensor files of one rank in a save: several tensors are written at a time, and read back behind the writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path

from dist_cpt.checkpoint.plan_files import PlannedFile
from dist_cpt.checkpoint.safetensors_stream import FileScan, StreamWriter
from dist_cpt.errors import CheckpointError, WriteError
from dist_cpt.runtime.collectives import rank
from dist_cpt.runtime.threads import enough_under_way, started
from dist_cpt.training_state import ExportedTensor, TensorKey

_WRITING = 2  # tensors at a time, or four times as many while they are small


class TensorFiles:
    """Opened with `open`, filled with `write`, ended with `finish`, compared with `read_back`; `close` in any case.

    `wrote` is called on the caller's thread once for every tensor that is written. Errors are those of `StreamWriter`
    and OSError; after one, only `close` may follow.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[PlannedFile],
        shapes: Mapping[str, tuple[int, ...]],
        wrote: Callable[[], object],
    ) -> None:
        self._folder, self._files, self._shapes, self._wrote = folder, files, shapes, wrote
        self._writers: list[StreamWriter] = []
        self._places: dict[TensorKey, list[tuple[StreamWriter, str]]] = {}
        self._writing: deque[tuple[ExportedTensor, int, Future[str]]] = deque()
        self._contents: list[Future[FileScan]] = []
        self.hashes: dict[str, str] = {}  # sha256 by `kind.name`

    def open(self) -> None:
        """Create the files."""
        for file in self._files:
            shapes = {key: self._shapes[name] for key, (_, name) in file.tensors.items()}
            self._writers.append(StreamWriter(self._folder / file.name, shapes))
            self._contents.append(started(self._writers[-1].read_back))
            for key, tensor in file.tensors.items():
                self._places.setdefault(tensor, []).append((self._writers[-1], key))

    def write(self, tensor: ExportedTensor) -> None:
        """Begin to write a tensor, if it belongs into these files."""
        places = self._places.get((tensor.kind, tensor.name))
        if places is None:
            return
        if tensor.values is None:
            raise CheckpointError(f"{tensor.kind}.{tensor.name} did not arrive at its owner, rank {rank()}")
        while enough_under_way([num_bytes for _, num_bytes, _ in self._writing], _WRITING):
            self._end_oldest()
        writing = started(partial(_write, tensor, places))
        self._writing.append((tensor, tensor.values.nbytes, writing))

    def finish_writes(self) -> None:
        """Wait until every tensor is written, if not on the disk."""
        while self._writing:
            self._end_oldest()

    def finish(self) -> None:
        """Force the files to the disk."""
        for writer in self._writers:
            writer.finish()

    def read_back(self) -> dict[str, tuple[int, str]]:
        """(bytes, sha256) of each file as it is on the disk, when all of it has been read.

        Raises:
            WriteError: the disk returned something other than what was written.
        """
        files = {}
        for file, reading in zip(self._files, self._contents, strict=True):
            content = reading.result()
            files[file.name] = (content.num_bytes, content.sha256)
            for key, (kind, name) in file.tensors.items():
                tensor = content.tensors.get(key)
                expected = (self._shapes[name], self.hashes[f"{kind}.{name}"], True)
                if tensor is None or (tensor.shape, tensor.sha256, tensor.finite) != expected:
                    raise WriteError(
                        f"{self._folder / file.name}: {key} reads back differently than it was written",
                        remedy="the disk or its driver loses data; the earlier checkpoints are kept",
                    )
        return files

    def close(self) -> None:
        """Close the files as they are, when no thread uses them."""
        wait([writing for _, _, writing in self._writing])
        for writer in self._writers:
            writer.close()
        wait(self._contents)

    def _end_oldest(self) -> None:
        tensor, _, writing = self._writing.popleft()
        self.hashes[f"{tensor.kind}.{tensor.name}"] = writing.result()
        self._wrote()


def _write(tensor: ExportedTensor, places: Sequence[tuple[StreamWriter, str]]) -> str:
    assert tensor.values is not None
    return [writer.write(key, tensor.values) for writer, key in places][-1]  # several where a tied matrix has two keys
