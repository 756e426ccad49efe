"""The one exception for mistakes of the user; entry points print it as plain lines and exit with code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """A wrong key, file or combination. The message names the key or file, the value found and what is allowed."""


def guarded(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run the body of an entry point; a ``UserError`` is printed as plain lines, exit code 2.

    Args:
        interrupted: what is said after Ctrl-C.
    """
    try:
        return main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
