# SPDX-License-Identifier: BSD-3-Clause
"""All ten claims: ``python -m examples.claims [--quick] [NAME ...]``."""

from examples.claims.report import main_of_all

if __name__ == "__main__":
    main_of_all(__doc__)
