// Activations and their derivatives on Vec, one or more floats, which the including file defines
// in the unnamed namespace with set, + - * /, fma, min, max, nearest and times_power_of_two.
//
// No functions of the standard library here: compiled for some set of instructions, they could be
// taken by the linker for the rest of the program.
#pragma once

namespace contrec::cpu {
namespace {

// erf(x / sqrt(2)), a rational function fitted to within 2e-8; 1 where |x| is above 3.925 sqrt(2).
inline Vec erf_of_root(Vec x) {
  const Vec bound = Vec::set(3.925f);
  const Vec z = min(max(x * Vec::set(0.70710678f), Vec::set(0.0f) - bound), bound);
  const Vec y = z * z;
  Vec p = Vec::set(2.04603816200688e-06f), q = Vec::set(3.8047957787057385e-05f);
  p = fma(p, y, Vec::set(0.0002848448057193309f));
  q = fma(q, y, Vec::set(0.00116386276204139f));
  p = fma(p, y, Vec::set(0.0037725630681961775f));
  q = fma(q, y, Vec::set(0.014983221888542175f));
  p = fma(p, y, Vec::set(0.052769340574741364f));
  q = fma(q, y, Vec::set(0.11418280005455017f));
  p = fma(p, y, Vec::set(0.1905938982963562f));
  q = fma(q, y, Vec::set(0.5022421479225159f));
  p = fma(p, y, Vec::set(1.1283791065216064f));
  q = fma(q, y, Vec::set(1.0f));
  return z * p / q;
}

// x Phi(x).
inline Vec gelu(Vec x) {
  const Vec half = x * Vec::set(0.5f);
  return fma(half, erf_of_root(x), half);
}

// exp of x in [-87, 87], by Taylor's series around the nearest multiple of log 2.
inline Vec exponential(Vec x) {
  const Vec n = nearest(x * Vec::set(1.44269504f));
  Vec r = fma(n, Vec::set(-0.693359375f), x);
  r = fma(n, Vec::set(2.12194440e-4f), r);
  Vec s = Vec::set(1.0f / 5040);
  s = fma(s, r, Vec::set(1.0f / 720));
  s = fma(s, r, Vec::set(1.0f / 120));
  s = fma(s, r, Vec::set(1.0f / 24));
  s = fma(s, r, Vec::set(1.0f / 6));
  s = fma(s, r, Vec::set(0.5f));
  s = fma(s, r, Vec::set(1.0f));
  s = fma(s, r, Vec::set(1.0f));
  return times_power_of_two(s, n);
}

// Phi(x) + x phi(x), and gelu(x) beside it.
inline Vec gelu_derivative(Vec x, Vec& value) {
  const Vec phi = fma(Vec::set(0.5f), erf_of_root(x), Vec::set(0.5f));
  const Vec exponent = max(x * x * Vec::set(-0.5f), Vec::set(-87.0f));
  value = x * phi;
  return fma(x * Vec::set(0.39894228f), exponential(exponent), phi);
}

inline Vec sigmoid(Vec x) {
  const Vec bound = Vec::set(87.0f), one = Vec::set(1.0f);
  return one / (one + exponential(min(max(Vec::set(0.0f) - x, Vec::set(0.0f) - bound), bound)));
}

inline Vec silu(Vec x) {
  const Vec bound = Vec::set(87.0f);
  const Vec e = exponential(min(max(Vec::set(0.0f) - x, Vec::set(0.0f) - bound), bound));
  return x / (Vec::set(1.0f) + e);
}

inline Vec silu_derivative(Vec x, Vec& value) {
  const Vec share = sigmoid(x);
  value = x * share;
  return fma(value, Vec::set(1.0f) - share, share);
}

}  // namespace
}  // namespace contrec::cpu
