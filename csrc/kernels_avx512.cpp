// The products with AVX-512 (F, BW, DQ, VL): 32 registers of sixteen floats. setup.py compiles this file for those.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include "transpose8.inl"

namespace moelora {
namespace {

struct V {
  using Reg = __m512;
  static constexpr int W = 16, DOT = 6, EXPAND = 4, OUTER = 4;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set(float value) { return _mm512_set1_ps(value); }
  static Reg load(const float* from) { return _mm512_loadu_ps(from); }
  static Reg shift(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
  static Reg load(const bf16* from) { return shift(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Reg load(const float* from, int n) { return _mm512_maskz_loadu_ps(lanes(n), from); }
  static Reg load(const bf16* from, int n) { return shift(_mm256_maskz_loadu_epi16(lanes(n), from)); }
  static void store(float* to, Reg from) { _mm512_storeu_ps(to, from); }
  static void store(float* to, Reg from, int n) { _mm512_mask_storeu_ps(to, lanes(n), from); }
  static void narrow(const float* from, bf16* to) {
    const Reg value = load(from);
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i out = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(out));
  }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static __m256 fold(Reg a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
  static float sum(Reg a) {
    const __m256 eight = fold(a);
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void sum4(const Reg* a, float* out) {
    const Reg left = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const Reg right = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m256 all = fold(_mm512_add_ps(_mm512_shuffle_ps(left, right, 0x44), _mm512_shuffle_ps(left, right, 0xee)));
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

const Kernels* avx512_kernels() { return &TABLE; }

}  // namespace moelora

#else

namespace moelora {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace moelora

#endif
