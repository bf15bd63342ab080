"""torchrun as a child of `dist-cpt launch`: the same agent, with the run's own exit code and no banner.

`torchrun` itself turns every failure into exit code 1 and a traceback of its own; users who start it by
hand read the run's code in exit.json.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run torchrun's agent with torchrun's arguments; return the exit code of the first rank that failed."""
    os.environ.setdefault("LOGLEVEL", "ERROR")  # torch's own switch for its agent's log lines
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        run(get_args_parser().parse_args(list(argv)))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a negative code is the signal that ended the rank
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
