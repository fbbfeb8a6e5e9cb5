// The threads of the host kernels: they take jobs in the order in which these were handed over, one job at a time, in
// ranges. Idle threads sleep, so that torch's own have the cores.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace leapalign {

// work(begin, end) is called on ranges of `grain` items that cover [0, count), from several threads and in any order;
// then `then`, once. An exception of either ends the job.
struct Phase {
    size_t count, grain;
    std::function<void(size_t, size_t)> work;
    std::function<void()> then = [] {};
};

class Job {
public:
    explicit Job(size_t threads) : threads_(threads) {}

    std::vector<Phase> phases;
    double result = 0;  // for the last phase to set

    bool done() const { return done_; }

private:
    friend class Pool;
    size_t threads_;  // at most so many at once
    size_t phase_ = 0, next_ = 0, running_ = 0;
    std::exception_ptr error_;
    std::atomic<bool> done_{false};
    class Pool *pool_ = nullptr;
};

class Pool {
public:
    // The process's. After a fork the child has another one, without threads and jobs.
    static Pool &instance();

    // Starts threads up to the number that the job may use, and no more than it has ranges.
    void submit(const std::shared_ptr<Job> &job);

    // Waits for at most so long; whether the job is done. Throws what the job threw, and std::logic_error for a job that
    // was handed over before a fork and is not done: its threads are in the parent.
    bool wait(const Job &job, double seconds);

    // Threads start on these cores, one after the other; on any if there are none. Ends the present threads, once idle.
    // Throws std::invalid_argument where the system cannot do that.
    void pin(std::vector<int> cores);

    // Does what is left and ends the threads. What is handed over later starts new ones.
    void stop();

private:
    void work(size_t index);
    bool claimable(size_t index) const;
    void advance();

    std::mutex mutex_, starting_;
    std::condition_variable wake_, done_;
    std::deque<std::shared_ptr<Job>> jobs_;  // the first one is in work
    std::vector<std::thread> threads_;
    std::vector<int> cores_;
    bool stopping_ = false;
};

}  // namespace leapalign
