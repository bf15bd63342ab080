"""The dist-cpt command in this process: its exit code, and what it printed."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """The lines that tell the user what is wrong and what to do."""
        return [line for line in self.err.splitlines() if line.startswith("dist-cpt: ")]


def command(*arguments: object) -> Ended:
    """Run `dist-cpt arguments...` to its end."""
    from dist_cpt.cli import main

    out, err = io.StringIO(), io.StringIO()
    argv = ["dist-cpt", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            return Ended(int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() returned")
