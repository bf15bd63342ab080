"""torch's flight recorder of the last collectives of each rank, which a hang on GPUs leaves beside the stacks.

The defaults differ between versions and launchers. A run sets what it needs and keeps what the user has set.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

from dist_cpt.run_folder.names import flight_file, nccl_trace_prefix

RING_ENTRIES = 2000  # a few steps of a large model; about 1 MB


def set_nccl_defaults(run_folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what is unset, before the process group exists; a variable set under its older name counts as set.

    Source: torch 2.13, ProcessGroupNCCL.hpp and FlightRecorder.hpp.
    """
    wanted = {
        ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"): str(RING_ENTRIES),
        # Where torch writes the ring when a collective times out; it appends the rank.
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"): str(nccl_trace_prefix(run_folder)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
        ("TORCH_NCCL_ENABLE_MONITORING",): "1",  # the dump needs it
        # End the process on an error or a timeout; aborting the communicator first may itself hang.
        ("NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ASYNC_ERROR_HANDLING"): "3",
    }
    for names, value in wanted.items():
        if not any(name in environ for name in names):
            environ[names[-1]] = value


def save_flight_record(run_folder: Path, rank: int) -> Path | None:
    """Write the ring to `logs/flight-rank-N.json`; None if it is empty or this torch has none.

    For the watchdog, which ends a run before NCCL's own timeout would dump the ring.

    Raises:
        OSError: the file cannot be written.
    """
    import torch._C._distributed_c10d as c10d

    # The first name exists in torch builds with NCCL; in others the same ring records gloo's collectives.
    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    record = dump() if dump is not None else b""
    content = record if isinstance(record, bytes) else str(record).encode()
    if b'"entries"' not in content:
        return None
    path = flight_file(run_folder, rank)
    path.write_bytes(content)
    return path
