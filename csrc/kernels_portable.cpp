// The products for machines without AVX2, in the vector types of GCC and Clang: SSE2 on x86, NEON on ARM.
#include "kernels.h"

#include <cstring>

namespace moelora {
namespace {

struct V {
  static constexpr int W = 4, DOT = 3, EXPAND = 2, OUTER = 2;
  typedef float Reg __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));

  static Reg zero() { return Reg{}; }
  static Reg set(float value) { return Reg{value, value, value, value}; }
  static Reg load(const float* from, int n = W) {
    Reg out{};
    std::memcpy(&out, from, static_cast<size_t>(n) * sizeof(float));
    return out;
  }
  static Reg load(const bf16* from) {
    return reinterpret_cast<Reg>(Bits{from[0].bits, from[1].bits, from[2].bits, from[3].bits} << 16);
  }
  static Reg load(const bf16* from, int n) {
    bf16 all[W] = {};
    for (int i = 0; i < n; ++i) all[i] = from[i];
    return load(all);
  }
  static void store(float* to, Reg from, int n = W) { std::memcpy(to, &from, static_cast<size_t>(n) * sizeof(float)); }
  static void narrow(const float* from, bf16* to) {
    for (int i = 0; i < W; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof bits);
      const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      to[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
    }
  }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static float sum(Reg a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  static void sum4(const Reg* a, float* out) {
    for (int i = 0; i < 4; ++i) out[i] = sum(a[i]);
  }
  template <class X>
  static void transpose8(const X* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int r = 0; r < 8; ++r)
      for (int c = 0; c < 8; c += W) {
        const Reg row = load(from + r * from_stride + c);
        for (int i = 0; i < W; ++i) to[(c + i) * to_stride + r] = row[i];
      }
  }
};

}  // namespace
}  // namespace moelora

#include "kernels.inl"

namespace moelora {

const Kernels* portable_kernels() { return &TABLE; }

}  // namespace moelora
