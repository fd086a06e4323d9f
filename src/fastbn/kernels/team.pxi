# SPDX-License-Identifier: BSD-3-Clause
"""How the pieces of a phase are shared out to threads.

OpenMP starts the threads (team.h, since Cython's own parallel regions need Python);
who does which piece is decided here, since a static schedule waits for the slowest
thread and a dynamic one forgets which thread has which part of the tensor in its
cache. What the pieces are does not depend on it.

May: run pieces, count, wait. May not: know what a piece does. A part of drivers.pyx,
which has the sizes and the small functions used here.
"""

cdef extern from "team.h" nogil:
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

cdef struct Share:
    # The pieces that are left of a thread's share: the first, and the one after the
    # last, 32 bits each, in one number, so that both change at once.
    uint64_t left
    char line[56]           # no two shares on a line of the cache

cdef struct Team:
    const Phase* phase
    Py_ssize_t start        # the first of the pieces that are shared out
    Share* shares
    int threads
    uint64_t arrived
    uint64_t done
    uint64_t size           # threads that there are, perhaps fewer than asked for
    double gain             # seconds that one thread would have taken, as far as can be known


cdef inline uint64_t range_of(uint64_t start, uint64_t stop) noexcept nogil:
    return start << 32 | stop


cdef Py_ssize_t take(Share* share, bint last) noexcept nogil:
    # The first or the last piece that is left; -1: nothing is.
    cdef uint64_t left = atomic_read(&share.left), start, stop
    while True:
        start, stop = left >> 32, <uint32_t>left
        if start == stop:
            return -1
        if atomic_replace(&share.left, &left, range_of(start + 1 - last, stop - last)):
            return stop - 1 if last else start


cdef void take_part(void* context, int me) noexcept nogil:
    # A thread's own share first, then what is left of the others', from the end: a
    # thread that the system holds up holds up one piece, not its share.
    cdef Team* team = <Team*>context
    cdef double began = team_clock(), worked
    cdef Py_ssize_t i, pieces = 0
    cdef uint64_t helpers
    cdef int k
    atomic_increase(&team.arrived)
    for k in range(team.threads):
        while True:
            i = take(&team.shares[(me + k) % team.threads], k > 0)
            if i < 0:
                break
            team.phase.piece(team.phase, team.start + i, me)
            pieces += 1
    atomic_increase(&team.done)
    if me > 0:
        return
    team.size = team_size()
    worked = team_clock() - began
    helpers = atomic_read(&team.arrived) - 1
    await_others(team)
    # While this thread worked, each helper can have done no more than it. If it came too
    # late to work, they worked while it waited.
    team.gain = (1 + helpers) * worked if pieces > 0 else team.size * (team_clock() - began)


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


cdef double share_out(const Phase* phase, const Job* job, Py_ssize_t start,
                      Py_ssize_t stop) noexcept nogil:
    # Neighbouring pieces go to one thread: in turn, two threads would fight over the
    # lines of the output that their prefetchers reach for. Each phase shares out
    # alike, so that a thread finds in its cache what it left there. Returns the loss:
    # OpenMP, too, can let a call wait, before it begins, for a thread that is late.
    cdef int k, threads = job.threads
    cdef double began = team_clock()
    cdef Team team = Team(phase, start, <Share*>job.team, threads, 0, 0, 1, 0.0)
    cdef Py_ssize_t pieces = stop - start
    for k in range(threads):
        team.shares[k].left = range_of(ceil_div(pieces * k, threads),
                                       ceil_div(pieces * (k + 1), threads))
    in_parallel(threads, take_part, &team)
    return team_clock() - began - team.gain if team.size > 1 else 0.0


cdef bint asked_to_stop(const Job* job, double* asked) noexcept nogil:
    # Not often: the answer may have to wait for Python's lock.
    cdef double now = team_clock()
    if job.stopped == NULL or now - asked[0] < BETWEEN_QUESTIONS:
        return False
    asked[0] = now
    return job.stopped() != 0


cdef int run(const Phase* phase, Job* job) noexcept nogil:
    # In stretches of bounded work: between two of them the caller may stop the job.
    cdef Py_ssize_t pieces = phase.pieces
    cdef Py_ssize_t stretches = minimum(pieces, maximum(1, ceil_div(job.bytes, STRETCH)))
    cdef Py_ssize_t stretch, i, start, stop = 0
    cdef double asked = team_clock() if stretches > 1 else 0.0
    for stretch in range(stretches):
        if stretch > 0 and asked_to_stop(job, &asked):
            return STOPPED
        start, stop = stop, pieces * (stretch + 1) // stretches
        if job.threads > 1 and pieces > 1:
            job.team_loss += share_out(phase, job, start, stop)
        else:
            for i in range(start, stop):
                phase.piece(phase, i, 0)
    return 0


cdef int run_phases(const KernelTable* kernels, Job* whole,
                    const Operation* operation) noexcept nogil:
    cdef Job instance
    cdef Job* job
    cdef Phases phases
    cdef Py_ssize_t turn
    cdef int k, status
    for turn in range(turns(whole)):
        job = take_turn(kernels, whole, operation, turn, &instance, &phases)
        for k in range(phases.count):
            status = run(&phases.list[k], job)
            if status != 0:
                return status
        whole.team_loss = job.team_loss
    return 0
