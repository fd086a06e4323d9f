# SPDX-License-Identifier: BSD-3-Clause
"""``python -m fastbn`` prints `show_config()`; with ``--selftest``, it compares bits.

With ``stats``, ``merge`` or ``normalize`` it is the command ``fastbn``.
"""

import argparse
import sys

from fastbn import _selftest, show_config


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    if sys.argv[1:2] and sys.argv[1] in ("stats", "merge", "normalize"):
        from fastbn.data import _cli

        return _cli.main(sys.argv[1:])
    parser = argparse.ArgumentParser(
        "python -m fastbn",
        description="Print the configuration.",
        epilog="stats, merge and normalize are those of the command fastbn.",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="compare the results on this machine with the published ones, bit by bit (seconds)",
    )
    if parser.parse_args().selftest:
        return 0 if _selftest.main() else 1
    for key, value in show_config().items():
        print(f"{key:14} {', '.join(value) if isinstance(value, list) else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
