# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""How many threads a call gets, and where that number came from.

In this order: `set_num_threads` (or `threads`), the environment variable
FASTBN_NUM_THREADS, and else, at each call, the least of OpenMP's maximum, the
processors this process may run on, and its control group's quota. Small calls
stay serial whatever the number, and so does every call of a forked child.

A team can cost more than it gives: threads that rest have to be woken, and where
another library keeps the processors busy they come late, or the system puts them
behind the very thread that waits for them. A call cannot know; but it notices when
it waited for the others longer than they can have worked. Then the next calls of that
size are serial: one, twice as many each time it happens again, one less each time it
does not (docs/threads.md has the figures).

May: decide on numbers. May not: start threads.
"""
import operator
import os
import sys
from math import ceil

from fastbn import _cgroup, _forks

cdef extern from "_threads.h":
    bint forked()
    void notice_forks(bint forked_before)
    int openmp_version()
    int openmp_max_threads()
    int openmp_processors()
    double openmp_clock()
    const char* openmp_runtime()

cdef enum:
    LARGEST_TEAM = 1024
    PARALLEL_FROM = 512 << 10   # bytes of work: those of x, as often as it is read
    LONGEST_REST = 256          # calls

cdef Py_ssize_t parallel_from = PARALLEL_FROM   # below 0: every call is
cdef int resting = 0            # calls that are still to be serial
cdef int next_rest = 1
cdef double rest_until = 0.0    # of openmp_clock
cdef Py_ssize_t rest_below = 0  # bytes of work: larger calls need no rest

cdef int chosen = 0             # set_num_threads; 0: not set
cdef int from_environment = 0   # FASTBN_NUM_THREADS; 0: not set

# The quota may change while the process runs; to look it up takes 0.2 ms.
cdef double BETWEEN_LOOKS = 1.0     # seconds
cdef double LONGEST_LOSS = 0.05     # seconds; more, and the whole process was stopped
cdef int quota = LARGEST_TEAM
cdef double quota_looked_up = float("-inf")


cdef int parse(value, str name) except -1:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer of at least 1, or None, got {value!r}") from None
    if not 1 <= number <= LARGEST_TEAM:
        raise ValueError(f"{name}: expected an integer from 1 to {LARGEST_TEAM}, got {number}")
    return number


cdef int quota_threads() except -1:
    # Rounded up: part of a processor is still worth a thread.
    global quota, quota_looked_up
    now = openmp_clock()
    if now - quota_looked_up >= BETWEEN_LOOKS:
        processors = _cgroup.processors()
        quota = LARGEST_TEAM if processors is None else min(LARGEST_TEAM, ceil(processors))
        quota_looked_up = now
    return quota


cdef int current() except -1:
    if forked():
        return 1
    return chosen or from_environment or max(
        1, min(openmp_max_threads(), openmp_processors(), quota_threads()))


cpdef int threads_for(Py_ssize_t size) except -1:
    """Return the number of threads for a call with `size` bytes of work, about to begin."""
    global resting
    if size < parallel_from or openmp_version() == 0:
        return 1
    if size < rest_below:
        if resting > 0:
            resting -= 1
            return 1
        if openmp_clock() < rest_until:
            return 1
    return current()


cpdef int team_for(Py_ssize_t size) except -1:
    """Return the number of threads for a call from a host that keeps the team awake."""
    if size < parallel_from or openmp_version() == 0:
        return 1
    return current()


cpdef void team_was(double loss, Py_ssize_t size) noexcept:
    """Take note of the seconds that were lost with the team of a call: at most 0, if none."""
    global resting, next_rest, rest_until, rest_below
    if parallel_from < 0:
        return
    if loss > 0.0:
        # Once, and the threads were asleep; again, and others have the processors.
        rest_until = openmp_clock() + (next_rest - 1) * min(loss, LONGEST_LOSS)
        resting, next_rest = next_rest, min(2 * next_rest, LONGEST_REST)
        rest_below = 2 * size
    elif size < rest_below:
        next_rest = max(1, next_rest - 1)


def set_num_threads(n):
    """Set the number of threads that later calls use, in the whole process.

    Parameters
    ----------
    n : int or None
        At least 1. A number above the number of processors is honoured too.
        ``None`` restores the default: ``FASTBN_NUM_THREADS`` where it is set,
        otherwise, at each call, the least of OpenMP's maximum (which
        ``OMP_NUM_THREADS`` and threadpoolctl set), the processors this process
        may run on, and its control group's quota, rounded up.

    Raises
    ------
    TypeError
        If `n` is neither an integer nor ``None``.
    ValueError
        If `n` is less than 1 or more than 1024.

    Notes
    -----
    Results do not depend on the number of threads: not in a single bit.

    Some calls run on one thread whatever the number: those on less than 512 KB in
    inference, or less than 256 KB if `x` is read twice, as in training and backward (256
    bytes more for each channel of NHWC), those in a child of ``fork``, and a few after a call for
    which the other threads came too late. A number that the system cannot provide ends
    the process; that is OpenMP's way.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(2)
    >>> fastbn.get_num_threads()
    2
    >>> fastbn.set_num_threads(None)
    """
    global chosen
    chosen = 0 if n is None else parse(n, "n")


def get_num_threads():
    """Return the number of threads that a large call uses (one, without OpenMP).

    Returns
    -------
    int
        1 in a child of ``fork``.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.threads(3):
    ...     fastbn.get_num_threads()
    3
    """
    return current()


class threads:
    """Context manager that sets the number of threads and restores it after.

    The number is the process's: other Python threads see it too.

    Parameters
    ----------
    n : int or None
        As for `set_num_threads`.

    Raises
    ------
    TypeError, ValueError
        As for `set_num_threads`.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> with fastbn.threads(1):
    ...     fastbn.get_num_threads()
    1
    >>> fastbn.get_num_threads() == before
    True
    """

    def __init__(self, n):
        self._n = None if n is None else parse(n, "n")
        self._before = []

    def __enter__(self):
        self._before.append(chosen or None)
        set_num_threads(self._n)
        return self

    def __exit__(self, kind, error, traceback):
        set_num_threads(self._before.pop())

    def __repr__(self):
        return f"fastbn.threads({self._n})"


def always_parallel(on):
    """Give every call the number of threads that is set: for tests and the self-test."""
    global parallel_from, resting, next_rest, rest_until
    parallel_from, resting, next_rest = -sys.maxsize if on else PARALLEL_FROM, 0, 1
    rest_until = 0.0


def source():
    """Say where the number of threads comes from, for `show_config`."""
    if forked():
        return "forked child"
    if chosen:
        return "set_num_threads"
    if from_environment:
        return "FASTBN_NUM_THREADS"
    if openmp_version() == 0:
        return "built without OpenMP"
    limits = {
        "OpenMP": openmp_max_threads(),
        "CPU affinity": openmp_processors(),
        "control group's quota": quota_threads(),
    }
    return min(limits, key=limits.__getitem__)


def openmp():
    """Name OpenMP's runtime and version for `show_config`; None: built without."""
    if openmp_version() == 0:
        return None
    runtime = os.path.basename(openmp_runtime().decode(errors="replace"))
    return f"{runtime or 'unknown runtime'}, OpenMP {openmp_version()}"


def _read_environment():
    global from_environment
    text = os.environ.get("FASTBN_NUM_THREADS", "").strip()
    if text:
        try:
            number = int(text)
        except ValueError:
            raise ValueError("FASTBN_NUM_THREADS: expected an integer of at least 1, "
                             f"got {text!r}") from None
        from_environment = parse(number, "FASTBN_NUM_THREADS")


_read_environment()
notice_forks(_forks.WITH_OPENMP)
