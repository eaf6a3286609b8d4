#include "workspace.h"

#include <sched.h>

#include <atomic>
#include <cstdlib>

namespace swirl {
namespace {

constexpr size_t PAGE = 4096, KEPT_BYTES = size_t(64) << 20;
std::atomic<char*> kept{nullptr};

size_t& size_of(char* block) { return *(size_t*)block; }  // a block's first page holds its size

}  // namespace

char* acquire(size_t bytes) {
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    char* block = kept.exchange(nullptr);
    if (!block || size_of(block) < bytes) {
        std::free(block);
        block = (char*)std::aligned_alloc(PAGE, bytes + PAGE);
        if (!block) return nullptr;
        size_of(block) = bytes;
    }
    return block + PAGE;
}

void release(char* memory) {
    char* block = memory - PAGE;
    if (size_of(block) <= KEPT_BYTES) block = kept.exchange(block);
    std::free(block);
}

void wait_for(const int32_t* turn, int32_t mine) {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine; spins++)
        if (spins > 1000) sched_yield();  // more threads than free cores: let the other one run
}

}  // namespace swirl
