#include "pool.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <system_error>

#include "portable.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define LEAPALIGN_FORKS 1
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace leapalign {
namespace {

std::atomic<Pool *> current{nullptr};  // never deleted: its threads may outlive static objects

#if defined(LEAPALIGN_FORKS)
const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
#endif

void pin_this_thread(int core) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a core that is not there: stays as it was
#else
    (void)core;
#endif
}

}  // namespace

Pool &Pool::instance() {
#if defined(LEAPALIGN_FORKS)
    (void)registered;
#endif
    Pool *pool = current.load();
    if (!pool) {
        Pool *made = new Pool;
        if (current.compare_exchange_strong(pool, made)) {
            pool = made;
        } else {
            delete made;  // another thread was first
        }
    }
    return *pool;
}

void Pool::submit(const std::shared_ptr<Job> &job) {
    size_t ranges = 1;
    for (const Phase &phase : job->phases) ranges = std::max(ranges, (phase.count + phase.grain - 1) / phase.grain);
    job->threads_ = std::min(job->threads_, ranges);
    std::lock_guard<std::mutex> starting(starting_);
    job->pool_ = this;
    const std::lock_guard<std::mutex> lock(mutex_);
    while (threads_.size() < job->threads_) {
        try {
            threads_.emplace_back([this, index = threads_.size()] { work(index); });
        } catch (const std::system_error &) {
            if (threads_.empty()) throw;
            break;  // the process may have no more threads: those that it has do the work
        }
    }
    jobs_.push_back(job);
    if (jobs_.size() == 1) advance();
}

bool Pool::wait(const Job &job, double seconds) {
    if (!job.done_ && job.pool_ != this) {
        throw std::logic_error("this work was handed over before the process forked: its threads are in the parent");
    }
    if (!job.done_) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!done_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return job.done_.load(); })) return false;
    }
    if (job.error_) std::rethrow_exception(job.error_);
    return true;
}

void Pool::pin(std::vector<int> cores) {
#if defined(__linux__)
    for (const int core : cores) {
        if (core < 0 || core >= CPU_SETSIZE) throw std::invalid_argument("a core's number is out of range");
    }
#else
    if (!cores.empty()) throw std::invalid_argument("threads cannot be pinned to cores on this system");
#endif
    stop();
    std::lock_guard<std::mutex> lock(mutex_);
    cores_ = std::move(cores);
}

void Pool::stop() {
    std::lock_guard<std::mutex> starting(starting_);
    std::vector<std::thread> threads;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;
        threads.swap(threads_);
        wake_.notify_all();
    }
    for (std::thread &thread : threads) thread.join();
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = false;
}

bool Pool::claimable(size_t index) const {
    if (jobs_.empty()) return false;
    const Job &job = *jobs_.front();
    return index < job.threads_ && job.phase_ < job.phases.size() && job.next_ < job.phases[job.phase_].count;
}

void Pool::work(size_t index) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!cores_.empty()) pin_this_thread(cores_[index % cores_.size()]);
    const ExactFloats exact;
    for (;;) {
        wake_.wait(lock, [&] { return claimable(index) || (stopping_ && jobs_.empty()); });
        if (!claimable(index)) return;
        const std::shared_ptr<Job> job = jobs_.front();
        const Phase &phase = job->phases[job->phase_];
        const size_t begin = job->next_, end = phase.count - begin < phase.grain ? phase.count : begin + phase.grain;
        job->next_ = end;
        ++job->running_;
        lock.unlock();
        std::exception_ptr error;
        try {
            phase.work(begin, end);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        if (error) {
            job->next_ = phase.count;  // the rest is left undone
            if (!job->error_) job->error_ = error;
        }
        --job->running_;
        if (job->running_ == 0 && job->next_ == phase.count) {
            if (!job->error_) {
                try {
                    phase.then();
                } catch (...) {
                    job->error_ = std::current_exception();
                }
            }
            ++job->phase_, job->next_ = 0;
            advance();
        }
    }
}

// With the lock held: goes on to the first phase that has work for the threads, of this job or a later one.
void Pool::advance() {
    while (!jobs_.empty()) {
        Job &job = *jobs_.front();
        const bool over = job.error_ || job.phase_ == job.phases.size();
        if (!over && job.phases[job.phase_].count > 0) break;
        if (!over) {
            try {
                job.phases[job.phase_].then();
            } catch (...) {
                job.error_ = std::current_exception();
            }
            ++job.phase_, job.next_ = 0;
            continue;
        }
        job.done_ = true;
        jobs_.pop_front();
        done_.notify_all();
    }
    wake_.notify_all();
}

}  // namespace leapalign
