// The table of one instruction set. Compiled once per instruction set; isa.cpp chooses among the tables.
#include "isa_kernels.h"

namespace skipkv {
namespace SKIPKV_ISA {

extern const Kernels kKernels;
#define SKIPKV_STRING_(x) #x
#define SKIPKV_STRING(x) SKIPKV_STRING_(x)
const Kernels kKernels = {SKIPKV_STRING(SKIPKV_ISA),
                          score_scratch,
                          score,
                          attention_scratch,
                          attention,
                          cosines_scratch,
                          cosines,
                          norms_scratch,
                          norms,
                          pool_scratch,
                          pool,
                          central_scratch,
                          central,
                          steer,
                          dequantise,
                          similar,
                          similar_scratch,
                          accumulate,
                          normalise};

}  // namespace SKIPKV_ISA
}  // namespace skipkv
