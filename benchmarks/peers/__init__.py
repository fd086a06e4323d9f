# SPDX-License-Identifier: BSD-3-Clause
"""How each library carries out one case, prepared as well as it can be.

A module for each, named like it; to import it needs the library. Its `contenders(a)`
does beforehand whatever can be done beforehand: sessions, compilation, pointers, tensors
that share the arrays' memory. Without the operation, the dtype or the layout it yields
nothing. Where a library has both, its normal call, which returns a new tensor, and one
that writes to an existing tensor are two contenders; and so are two ways to the same
result, where it is not clear which one is faster.
"""
