# SPDX-License-Identifier: BSD-3-Clause
"""``python -m fastbn`` prints `show_config()`; with ``--selftest``, it compares bits."""

import argparse
import sys

from fastbn import _selftest, show_config


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser("python -m fastbn", description="Print the configuration.")
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
