// What the files of the binding share.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <initializer_list>
#include <string>

#include "linear.h"
#include "linear_log_prob.h"
#include "pointwise.h"
#include "tree_attention.h"
#include "tree_decode.h"

namespace nb = nanobind;
using Tensor = nb::ndarray<nb::c_contig, nb::device::cpu>;

struct Isa {
    const char* name;
    bool (*tree_attention_fwd)(const swirl::Problem&);
    bool (*tree_attention_bwd)(const swirl::Problem&);
    bool (*linear_fwd)(const swirl::Linear&);
    bool (*linear_dx)(const swirl::Linear&);
    bool (*linear_dw)(const swirl::Linear&);
    bool (*linear_log_prob_fwd)(const swirl::LinearLogProb&);
    bool (*linear_log_prob_bwd)(const swirl::LinearLogProb&);
    void (*rms_norm_fwd)(const swirl::RmsNorm&);
    bool (*rms_norm_bwd)(const swirl::RmsNorm&);
    void (*geglu_fwd)(const swirl::Geglu&);
    void (*geglu_bwd)(const swirl::Geglu&);
    void (*rope)(const swirl::Rope&);
    void (*norm_rope_fwd)(const swirl::NormRope&);
    bool (*norm_rope_bwd)(const swirl::NormRope&);
    bool (*tree_decode)(const swirl::TreeDecode&);
    bool (*decode)(const swirl::Decode&);
    bool (*here)();
};

// The best instruction set here, or the one of that name. Throws std::invalid_argument where it is not to be had.
const Isa& pick(const std::string& name);

swirl::Dtype dtype_of(const Tensor& x);

// Throws std::invalid_argument where x has another dtype or shape.
void expect(const Tensor& x, nb::dlpack::dtype dtype, std::initializer_list<size_t> shape, const char* name);

void bind_decode(nb::module_& m);
