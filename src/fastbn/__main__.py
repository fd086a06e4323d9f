# SPDX-License-Identifier: BSD-3-Clause
"""``python -m fastbn`` prints `show_config()`."""

from fastbn import show_config

for key, value in show_config().items():
    print(f"{key:14} {', '.join(value) if isinstance(value, list) else value}")
