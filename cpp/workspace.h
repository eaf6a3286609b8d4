// Scratch memory that outlives a call: fresh pages cost the kernel more time than a short call computes.
#pragma once
#include <cstddef>

namespace swirl {

// At least `bytes`, aligned to a page, contents undefined; null where memory ran out.
char* acquire(size_t bytes);
// Gives it back. One block of at most 64 MB is kept for the next call; the rest goes to the system.
void release(char* memory);

}  // namespace swirl
