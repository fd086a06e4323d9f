# SPDX-License-Identifier: BSD-3-Clause
"""The programs of the site's gallery. ``python -m examples.gallery`` records what they print."""
