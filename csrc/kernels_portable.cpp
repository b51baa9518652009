// The products in plain C++, for machines without AVX2. Four lanes suit every baseline instruction set.
#include "kernels.h"

#include <cstring>

namespace moelora {
namespace {

struct V {
  static constexpr int W = 4, DOT = 3, EXPAND = 1, OUTER = 2;
  struct Reg {
    float at[W];
  };

  static Reg zero() { return {}; }
  static Reg set(float value) { return {value, value, value, value}; }
  static Reg load(const float* from, int n = W) {
    Reg out = {};
    for (int i = 0; i < n; ++i) out.at[i] = from[i];
    return out;
  }
  static Reg load(const bf16* from, int n = W) {
    Reg out = {};
    for (int i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
      std::memcpy(out.at + i, &bits, sizeof bits);
    }
    return out;
  }
  static Reg load_unless(uint8_t skip, const float* from) { return load(from, skip ? 0 : W); }
  static void store(float* to, Reg from, int n = W) {
    for (int i = 0; i < n; ++i) to[i] = from.at[i];
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    for (int i = 0; i < W; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static float sum(Reg a) { return (a.at[0] + a.at[1]) + (a.at[2] + a.at[3]); }
  static void sum4(const Reg* a, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
  }
  template <class X>
  static void transpose8(const X* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < 8; c += W) {
        const Reg row = load(from + r * from_stride + c);
        for (int i = 0; i < W; ++i) to[(c + i) * to_stride + r] = row.at[i];
      }
  }
};

}  // namespace
}  // namespace moelora

#include "kernels.inl"

namespace moelora {

const Kernels* portable_kernels() {
  static constexpr Kernels kernels = table("portable");
  return &kernels;
}

}  // namespace moelora
