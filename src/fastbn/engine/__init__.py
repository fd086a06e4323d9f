# SPDX-License-Identifier: BSD-3-Clause
"""The engine: a call of fastbn.h -> results. fastbn.kernels has the map."""
