# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of data sets, and data sets normalised: files, folders, stores, iterables.

    what a user names -> opening -> sources (parts and their units; blocks, raw)
    units -> scan (threads, merged in order) -> BatchStats -> files (JSON)
    units -> stacks (one array of all parts) -> writing -> destinations, journal

Files and chunks are read by other libraries (``pip install "fastbn[data]"``), each of which is
imported when it is needed; .npy needs none. fastbn itself never imports this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbn._docs import filled
from fastbn.data import opening, scan, writing

if TYPE_CHECKING:
    import os

    from numpy.typing import ArrayLike, DTypeLike

    from fastbn.stats import BatchStats

__all__ = ["normalize", "stats"]


@filled
def stats(
    source: Any,
    *,
    layout: str | None = None,
    nan_policy: str = "propagate",
    nodata: ArrayLike | None = None,
    mode: str | None = None,
    workers: int = 1,
    progress: bool = False,
) -> BatchStats:
    """Return the statistics of each channel of a data set, which is never whole in memory.

    Parameters
    ----------
    {source}
    {source_layout}
    nan_policy, nodata
        As for `fastbn.batch_stats`.
    {mode}
    {workers}
    {progress}

    Returns
    -------
    BatchStats
        The units of `source`, merged in its order, whatever `workers` is. Statistics of
        integers are the same for any order and cut.

    Raises
    ------
    ValueError
        For what cannot be read or has another number of channels, which is named; for
        arguments out of range.
    TypeError
        For a `source` or a dtype that is not taken.
    FileNotFoundError
        If there is no such file.
    ImportError
        If a library is missing; the message names the extra.

    Examples
    --------
    >>> import numpy as np, fastbn.data
    >>> batches = (np.full((2, 3, 4, 4), i, np.uint8) for i in range(5))
    >>> fastbn.data.stats(batches).mean
    array([2., 2., 2.])
    """
    opened = opening.open_source(source, layout, mode)
    options = scan.Options(nan_policy, nodata)
    return scan.scan(opened, options, workers=workers, progress=progress).total.counted.stats


@filled
def normalize(
    source: Any,
    destination: str | os.PathLike[str],
    stats: BatchStats | tuple[ArrayLike, ArrayLike] | str | os.PathLike[str],
    *,
    layout: str | None = None,
    out_layout: str | None = None,
    max_value: float = 1.0,
    dtype: DTypeLike = "float32",
    mode: str | None = None,
    workers: int = 1,
    progress: bool = False,
    resume: bool = False,
) -> None:
    """Write a data set normalised, ``(x / max_value - mean) / std``, as one array.

    Parameters
    ----------
    {source}
        Several arrays are joined along N; images of one size are stacked.
    destination : path
        Of a .npy file or a .zarr array that does not exist. What is not yet complete is in
        the folder ``DEST.partial``.
    stats : BatchStats, tuple of mean and std, or path
        A path is that of a file of ``fastbn stats``, or of ``{"mean": [...], "std": [...]}``.
    {source_layout}
    out_layout : str, optional
        The letters of `layout` in another order: that of the axes of the result.
    max_value : float, default 1.0
        What stands for 1 in `mean` and `std`. BatchStats, and files of them, are in the
        units of the data: 1.0 only.
    dtype : dtype, default float32
        A float type.
    {mode}
    {workers}
    {progress}
    resume : bool, default False
        Go on with ``DEST.partial``, if source, statistics and options are the same.

    Raises
    ------
    FileExistsError
        If `destination` exists, or ``DEST.partial`` without `resume`. Neither is touched.
    ValueError
        As `stats` and `fastbn.normalize`; for another source, statistics or options than
        those that ``DEST.partial`` was begun with.
    TypeError
        As `stats` and `fastbn.normalize`; for an iterable, whose length is not known.

    Examples
    --------
    >>> import numpy as np, fastbn.data, tempfile, pathlib
    >>> x = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     name = pathlib.Path(folder) / "y.npy"
    ...     fastbn.data.normalize(x, name, (5.5, 2.0), layout="NWC")
    ...     np.load(name)[0, 0].tolist()
    [-2.75, -2.25, -1.75]
    """
    writing.normalize(
        source, destination, stats, layout=layout, out_layout=out_layout, max_value=max_value,
        dtype=dtype, mode=mode, workers=workers, progress=progress, resume=resume,
    )  # fmt: skip
