// The element types tensors come in.
#pragma once
#include <cstdint>

namespace swirl {

enum class Dtype { float32, float64, bfloat16 };

struct Bfloat16 {
    uint16_t bits;
};

}  // namespace swirl
