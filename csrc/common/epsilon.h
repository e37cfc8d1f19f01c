// `EPSILON` of ops/functional.py.
#pragma once

namespace skipkv {

constexpr float kEpsilon = 1e-8f;  // added to the length of a vector that becomes a unit vector

}  // namespace skipkv
