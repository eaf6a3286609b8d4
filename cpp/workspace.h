// Scratch memory that outlives a call: fresh pages cost the kernel more time than a short call computes. And turns, in
// which threads add to one sum.
#pragma once
#include <cstddef>
#include <cstdint>

namespace swirl {

// At least `bytes`, aligned to a page, contents undefined; null where memory ran out.
char* acquire(size_t bytes);
// Gives it back. One block of at most 64 MB is kept for the next call; the rest goes to the system.
void release(char* memory);

// Returns once another thread has stored `mine`, with release order.
void wait_for(const int32_t* turn, int32_t mine);

}  // namespace swirl
