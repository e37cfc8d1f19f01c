// Constants of `central_tokens`; see `skipkv_vllm/ops/clusters.py`.
#pragma once

namespace skipkv {

constexpr int kMostClusters = 64;
constexpr int kRounds = 5;
// Squared distances up to this factor above the smallest count as equal to it.
constexpr float kTie = 1.0001f * 1.0001f;

}  // namespace skipkv
