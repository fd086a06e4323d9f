# SPDX-License-Identifier: BSD-3-Clause
# How the tasks of a phase are shared out to threads.
#
# OpenMP starts the threads (threads.h, since Cython's own parallel regions need Python);
# who does which task is decided here, since a static schedule waits for the slowest
# thread and a dynamic one forgets which thread has which part of the tensor in its
# cache. What the tasks are does not depend on it.
#
# May run tasks, count, wait. May not know what a task does. A part of core.pyx.

cdef extern from "threads.h" nogil:
    void in_parallel(int threads, void (*member)(void* team, int me) noexcept nogil,
                     void* team)
    int team_size()
    uint64_t atomic_read(const uint64_t* p)
    void atomic_increase(uint64_t* p)
    bint atomic_replace(uint64_t* p, uint64_t* expected, uint64_t wanted)
    double team_clock()
    double BETWEEN_QUESTIONS
    void relax()
    void give_way()
    void nap()

cdef enum:
    # How often a thread that waits for another tries the quicker ways first.
    RELAXED = 1000
    GIVING_WAY = RELAXED + 100
    # Bytes, after which the caller may interrupt a call.
    INTERRUPT_INTERVAL = 128 << 20

cdef struct Team:
    const Phase* phase
    Py_ssize_t start        # the first of the tasks that are shared out
    Share* shares
    int threads
    uint64_t arrived
    uint64_t done
    uint64_t size           # threads that there are, perhaps fewer than asked for
    double gain             # seconds that one thread would have taken, as far as can be known


cdef inline uint64_t range_of(uint64_t start, uint64_t stop) noexcept nogil:
    return start << 32 | stop


cdef enum:
    FIRST, LAST

cdef Py_ssize_t take(Share* share, int end) noexcept nogil:
    # The first or the last task that is left; -1: nothing is.
    cdef uint64_t left = atomic_read(&share.left), start, stop
    while True:
        start, stop = left >> 32, <uint32_t>left
        if start == stop:
            return -1
        if end == LAST:
            if atomic_replace(&share.left, &left, range_of(start, stop - 1)):
                return stop - 1
        elif atomic_replace(&share.left, &left, range_of(start + 1, stop)):
            return start


cdef void await_others(Team* team) noexcept nogil:
    # OpenMP's barrier would spin for milliseconds, perhaps on the very processor
    # that a late thread waits for.
    cdef int waits = 0
    while atomic_read(&team.done) < team.size:
        if waits < RELAXED:
            relax()
        elif waits < GIVING_WAY:
            give_way()
        else:
            nap()
        waits += 1


cdef void take_part(void* context, int me) noexcept nogil:
    # A thread's own share first, then what is left of the others', from the end: a
    # thread that the system holds up holds up one task, not its share.
    cdef Team* team = <Team*>context
    cdef double began = team_clock(), worked
    cdef Py_ssize_t i, tasks = 0
    cdef uint64_t helpers
    cdef int k
    atomic_increase(&team.arrived)
    for k in range(team.threads):
        while True:
            i = take(&team.shares[(me + k) % team.threads], LAST if k > 0 else FIRST)
            if i < 0:
                break
            team.phase.run(team.phase, team.start + i, me)
            tasks += 1
    atomic_increase(&team.done)
    if me > 0:
        return
    team.size = team_size()
    worked = team_clock() - began
    helpers = atomic_read(&team.arrived) - 1
    await_others(team)
    # While this thread worked, each helper can have done no more than it. If it came too
    # late to work, they worked while it waited.
    team.gain = (1 + helpers) * worked if tasks > 0 else team.size * (team_clock() - began)


cdef double share_out(const Phase* phase, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
    # Neighbouring tasks go to one thread: dealt out one by one, two threads would fight
    # over the lines of the output that their prefetchers reach for. Each phase shares out
    # alike, so that a thread finds in its cache what it left there. Returns the loss:
    # OpenMP, too, can let a call wait, before it begins, for a thread that is late.
    cdef int k, threads = phase.request.workers
    cdef double began = team_clock()
    cdef Team team = Team(phase, start, <Share*>phase.request.shares, threads, 0, 0, 1, 0.0)
    cdef Py_ssize_t tasks = stop - start
    for k in range(threads):
        team.shares[k].left = range_of(ceil_div(tasks * k, threads),
                                       ceil_div(tasks * (k + 1), threads))
    in_parallel(threads, take_part, &team)
    return team_clock() - began - team.gain if team.size > 1 else 0.0


cdef bint asked_to_stop(const Request* r, double* asked) noexcept nogil:
    # Not often: the answer may have to wait for Python's lock.
    cdef double now = team_clock()
    if r.extras.interrupted == NULL or now - asked[0] < BETWEEN_QUESTIONS:
        return False
    asked[0] = now
    return r.extras.interrupted() != 0


cdef int run_phase(const Phase* phase, Request* r) noexcept nogil:
    # In intervals of bounded work: between two of them the caller may stop the call.
    cdef Py_ssize_t tasks = phase.tasks
    cdef Py_ssize_t intervals = minimum(tasks, maximum(1, ceil_div(r.job.plan.bytes,
                                                                   INTERRUPT_INTERVAL)))
    cdef Py_ssize_t interval, i, start, stop = 0
    cdef double asked = team_clock() if intervals > 1 else 0.0
    for interval in range(intervals):
        if interval > 0 and asked_to_stop(r, &asked):
            return INTERRUPTED
        start, stop = stop, tasks * (interval + 1) // intervals
        if r.workers > 1 and tasks > 1:
            r.loss += share_out(phase, start, stop)
        else:
            for i in range(start, stop):
                phase.run(phase, i, 0)
    return FASTBN_OK


cdef int run_listed(const Phases* phases, Request* r) noexcept nogil:
    cdef int k, status
    for k in range(phases.count):
        status = run_phase(&phases.list[k], r)
        if status != FASTBN_OK:
            return status
    return FASTBN_OK


cdef int run_phases(Request* r) noexcept nogil:
    cdef Job own
    cdef Phases phases
    cdef Py_ssize_t round
    cdef int status
    for round in range(count_rounds(r)):
        list_phases(r, round, &own, &phases)
        status = run_listed(&phases, r)
        if status != FASTBN_OK:
            return status
    return FASTBN_OK
