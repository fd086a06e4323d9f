# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""How many threads a call gets, and where that number came from.

In this order: `set_num_threads` (or `threads`), the environment variable
FASTBN_NUM_THREADS, and else, at each call, the least of OpenMP's maximum and
the processors this process may run on. Small calls stay serial whatever the
number. May: decide on numbers. May not: start threads.
"""
import operator
import os

cdef extern from "_threads.h":
    int openmp_version()
    int openmp_max_threads()
    int openmp_processors()
    const char* openmp_runtime()

cdef enum:
    LARGEST_TEAM = 1024

# Below this many elements (512 KB of float32) a second thread gains little, and a
# lot is lost where another library keeps the processors busy.
cdef Py_ssize_t serial_below = 1 << 17

cdef int chosen = 0             # set_num_threads; 0: not set
cdef int from_environment = 0   # FASTBN_NUM_THREADS; 0: not set
cdef bint forked = False        # OpenMP's threads do not survive a fork


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


cdef int default_threads() noexcept:
    return max(1, min(openmp_max_threads(), openmp_processors()))


cdef int current() noexcept:
    return chosen or from_environment or default_threads()


cdef int threads_for(Py_ssize_t elements) noexcept:
    if elements < serial_below or forked or openmp_version() == 0:
        return 1
    return current()


def set_num_threads(n):
    """Set the number of threads that later calls use, in the whole process.

    Parameters
    ----------
    n : int or None
        At least 1. A number above the number of processors is honoured too.
        ``None`` restores the default: ``FASTBN_NUM_THREADS`` where it is set,
        otherwise the least of OpenMP's maximum and the processors this process
        may run on.

    Raises
    ------
    TypeError
        If `n` is neither an integer nor ``None``.
    ValueError
        If `n` is less than 1 or more than 1024.

    Notes
    -----
    Results do not depend on the number of threads: not in a single bit. A
    number that the system cannot provide ends the process; that is OpenMP's way.

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
    """Return the number of threads that a large call would use now.

    Returns
    -------
    int

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


def parallel_from(elements):
    """Set from how many elements on calls are parallel; return the old number.

    For tests, which want small calls on many threads.
    """
    global serial_below
    before = serial_below
    serial_below = elements
    return before


def source():
    """Say where the number of threads comes from, for `show_config`."""
    if chosen:
        return "set_num_threads"
    if from_environment:
        return "FASTBN_NUM_THREADS"
    if openmp_version() == 0:
        return "built without OpenMP"
    return "OpenMP" if openmp_max_threads() <= openmp_processors() else "CPU affinity"


def openmp():
    """Name OpenMP's runtime and version for `show_config`; None: built without."""
    if openmp_version() == 0:
        return None
    runtime = os.path.basename(openmp_runtime().decode(errors="replace"))
    return f"{runtime or 'unknown runtime'}, OpenMP {openmp_version()}"


def _after_fork_in_child():
    global forked
    forked = True


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
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
