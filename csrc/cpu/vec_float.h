// Products in float32 for vec_tile.h.
#pragma once

namespace contrec::cpu {
namespace {

using Element = float;
using Operand = Vec;
constexpr int kPair = 1;
inline void store_elements(Element* p, Vec a) { a.store(p); }
inline Operand load_operand(const Element* p) { return Vec::load(p); }
inline Operand broadcast(const Element* p) { return Vec::set(*p); }
inline Vec multiply(Operand a, Operand b, Vec sum) { return fma(a, b, sum); }

}  // namespace
}  // namespace contrec::cpu
