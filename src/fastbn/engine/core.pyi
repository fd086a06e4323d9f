# SPDX-License-Identifier: BSD-3-Clause
C_API: object

def use(*capsules: object, images: object) -> None: ...
