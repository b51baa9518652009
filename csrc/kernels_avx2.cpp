// The products with AVX2 and FMA: 16 registers of eight floats. setup.py compiles this file for those instructions.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "transpose8.inl"

namespace moelora {
namespace {

struct V {
  using Reg = __m256;
  static constexpr int W = 8, DOT = 3, EXPAND = 2, OUTER = 2;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set(float value) { return _mm256_set1_ps(value); }
  static Reg load(const float* from) { return _mm256_loadu_ps(from); }
  static Reg load(const bf16* from) { return load8(from); }
  static __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg load(const float* from, int n) { return _mm256_maskload_ps(from, lanes(n)); }
  static Reg load(const bf16* from, int n) {
    bf16 all[W] = {};
    for (int i = 0; i < n; ++i) all[i] = from[i];
    return load(all);
  }
  static void store(float* to, Reg from) { _mm256_storeu_ps(to, from); }
  static void store(float* to, Reg from, int n) { _mm256_maskstore_ps(to, lanes(n), from); }
  static void narrow(const float* from, bf16* to) {
    const Reg value = load(from);
    const __m256i bits = _mm256_castps_si256(value), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one());
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const Reg nearest = _mm256_castsi256_ps(_mm256_srli_epi32(sum, 16));
    const Reg nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc0));
    const __m256i out = _mm256_castps_si256(_mm256_blendv_ps(nearest, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
  }
  static __m256i one() { return _mm256_set1_epi32(1); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Reg a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void sum4(const Reg* a, float* out) {
    const Reg all = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  template <class X>
  static void transpose8(const X* from, int64_t from_stride, float* to, int64_t to_stride) {
    moelora::transpose8(from, from_stride, to, to_stride);
  }
};

}  // namespace
}  // namespace moelora

#include "kernels.inl"

namespace moelora {

const Kernels* avx2_kernels() { return &TABLE; }

}  // namespace moelora

#else

namespace moelora {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace moelora

#endif
