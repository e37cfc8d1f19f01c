// The effects that `measure_attention` sums; `skipkv_vllm/ops/effects.py` describes them.
#pragma once

namespace skipkv {

enum class Effect : int { kAttention, kOutput, kValue, kKey, kJoint, kSeen, kNegligible };

}  // namespace skipkv
