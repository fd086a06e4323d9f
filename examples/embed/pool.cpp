// SPDX-License-Identifier: BSD-3-Clause
// A pool of threads of one's own in C++: batch norm in training of an NHWC tensor of
// float32, forward and then backward of what came out, from standard input to standard
// output.
//
//     ./pool 32 56 56 64 < x > dx
#include <fastbn.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

// Threads that wait for work: `each` calls a function for tasks [0, n), on all of them.
class Pool {
  public:
    using Task = std::function<void(std::ptrdiff_t, int)>;

    explicit Pool(int workers)
    {
        for (int worker = 0; worker < workers; worker++)
            threads_.emplace_back([this, worker] { wait_and_work(worker); });
    }
    ~Pool()
    {
        each(0, nullptr, true);
        for (auto &thread : threads_)
            thread.join();
    }
    int workers() const { return static_cast<int>(threads_.size()); }

    void each(std::ptrdiff_t n, Task task, bool last = false)
    {
        std::unique_lock lock(mutex_);
        n_ = n, next_ = 0, busy_ = workers(), task_ = std::move(task), last_ = last, round_++;
        begun_.notify_all();
        done_.wait(lock, [this] { return busy_ == 0; });
    }

  private:
    void wait_and_work(int worker)
    {
        for (unsigned long seen = 0; !last_;) {
            {
                std::unique_lock lock(mutex_);
                begun_.wait(lock, [&] { return round_ != seen; });
                seen = round_;
            }
            for (std::ptrdiff_t i; (i = next_++) < n_;)
                task_(i, worker);
            std::lock_guard lock(mutex_);
            if (--busy_ == 0)
                done_.notify_one();
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable begun_, done_;
    std::atomic<std::ptrdiff_t> next_{0};
    std::ptrdiff_t n_ = 0;
    Task task_;
    int busy_ = 0;
    unsigned long round_ = 0;
    std::atomic<bool> last_{false};
};

static void check(const fastbn_api *fastbn, int code)
{
    if (code != FASTBN_OK)
        throw std::runtime_error(fastbn->error_message(code));
}

static void run(const fastbn_api *fastbn, const fastbn_call &call, Pool &pool)
{
    std::size_t size;
    check(fastbn, fastbn->workspace_size(&call, pool.workers(), &size));
    std::vector<char> workspace(size);
    void *place = workspace.data();
    check(fastbn, fastbn->begin(&call, pool.workers(), place, size));
    for (int phase = 0; phase < fastbn->phases(place); phase++)
        pool.each(fastbn->tasks(place, phase), [&](std::ptrdiff_t i, int worker) {
            fastbn->run_tasks(place, phase, i, i + 1, worker);
        });
    check(fastbn, fastbn->finish(place));
}

int main(int argc, char **argv)
{
    const fastbn_api *fastbn = fastbn_get_api();
    std::ptrdiff_t shape[4], count = 1;
    if (fastbn == nullptr || argc != 5)
        return 1;
    for (int axis = 0; axis < 4; axis++)
        count *= shape[axis] = std::atol(argv[axis + 1]);
    std::vector<float> x(count), y(count);
    std::vector<double> mean(shape[3]), invstd(shape[3]);
    if (std::fread(x.data(), sizeof(float), x.size(), stdin) != x.size())
        return 1;
    Pool pool(3);

    fastbn_call call{};
    call.struct_size = sizeof call;
    call.norm = FASTBN_BATCH_NORM, call.operation = FASTBN_FORWARD, call.dtype = FASTBN_FLOAT32;
    call.ndim = 4, call.channel_axis = 3, call.shape = shape, call.eps = 1e-5;
    call.x.data = x.data(), call.out.data = y.data();
    call.mean = mean.data(), call.invstd = invstd.data();
    run(fastbn, call, pool);
    call.operation = FASTBN_BACKWARD, call.dy.data = y.data();
    run(fastbn, call, pool);
    return std::fwrite(y.data(), sizeof(float), y.size(), stdout) != y.size();
}
