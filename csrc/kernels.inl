// The products, written for a vector type V that the including file defines (kernels_*.cpp).
//
// Every file that includes this is compiled for another instruction set. All of it therefore sits in an unnamed
// namespace and uses no library template: a shared inline function could be linked from the wrong file and stop an
// older machine with an illegal instruction.
//
// V gives: W lanes; Reg; zero, set(float), load(float* or bf16*), load(..., n) for the first n lanes and zeros,
// store(float*), store(..., n), fma(a, b, c) = a * b + c, sum(a), sum4(a[4], float out[4]); DOT, the rows of a tile of
// that product; EXPAND and OUTER, the vectors across one of those; transpose8(from, stride, to, stride);
// narrow(float*, bf16*), W numbers to the nearest, ties to even.
// A tile is sized so that its sums stay in registers.

#include <cstring>

namespace moelora {
namespace {

using Reg = V::Reg;
constexpr int64_t W = V::W;

// f(Count<n>()) for a number n from 1 to MOST that is known only now.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <int MOST, class F>
void with_count(int64_t n, const F& f) {
  if constexpr (MOST > 1)
    if (n < MOST) return with_count<MOST - 1>(n, f);
  f(Count<MOST>());
}

// dot: M rows of x by N rows of w. The sums run along the length, lanes are added up once at the end.
template <int M, int N, class X>
void dot_tile(const X* const* x, const float* w, int64_t w_stride, int64_t length, float* out, int64_t out_stride,
              bool add) {
  Reg sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = V::zero();
  int64_t d = 0;
  for (; d + W <= length; d += W) {
    Reg right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = V::load(w + n * w_stride + d);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Reg left = V::load(x[m] + d);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = V::fma(left, right[n], sums[m][n]);
    }
  }
  if (d < length) {
    const int rest = static_cast<int>(length - d);
    Reg right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = V::load(w + n * w_stride + d, rest);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Reg left = V::load(x[m] + d, rest);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = V::fma(left, right[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float total[4];
    if constexpr (N == 4) {
      V::sum4(sums[m], total);
    } else {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) total[n] = V::sum(sums[m][n]);
    }
    float* to = out + m * out_stride;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) to[n] = add ? to[n] + total[n] : total[n];
  }
}

template <int M, class X>
void dot_rows(const X* const* x, const float* w, int64_t w_stride, int64_t ranks, int64_t length, float* out,
              int64_t out_stride, bool add) {
  int64_t j = 0;
  for (; j + 4 <= ranks; j += 4) dot_tile<M, 4>(x, w + j * w_stride, w_stride, length, out + j, out_stride, add);
  for (; j + 2 <= ranks; j += 2) dot_tile<M, 2>(x, w + j * w_stride, w_stride, length, out + j, out_stride, add);
  for (; j < ranks; ++j) dot_tile<M, 1>(x, w + j * w_stride, w_stride, length, out + j, out_stride, add);
}

template <class X>
void dot(const void* data, int64_t x_stride, const int32_t* rows, int64_t count, const float* w, int64_t w_stride,
         int64_t ranks, int64_t length, float* out, int64_t out_stride, bool add) {
  const X* x = static_cast<const X*>(data);
  // Few ranks at a time, so that their rows of w stay in the first-level cache while the tokens pass.
  constexpr int64_t GROUP = 16;
  for (int64_t j = 0; j < ranks; j += GROUP) {
    const int64_t some = ranks - j < GROUP ? ranks - j : GROUP;
    const float* part = w + j * w_stride;
    for (int64_t m = 0; m < count; m += V::DOT) {
      const int now = static_cast<int>(count - m < V::DOT ? count - m : V::DOT);
      const X* at[V::DOT];
      for (int i = 0; i < now; ++i) at[i] = x + rows[m + i] * x_stride;
      float* to = out + m * out_stride + j;
      with_count<V::DOT>(now, [&](auto all) {
        dot_rows<decltype(all)::value, X>(at, part, w_stride, some, length, to, out_stride, add);
      });
    }
  }
}

// outer: M ranks by N vectors of columns; the tokens pass, the sums stay.
template <int M, int N, class X>
void outer_tile(const X* x, int64_t x_stride, const int32_t* rows, int64_t count, const float* u, int64_t u_stride,
                float* out, int64_t out_stride, bool add) {
  Reg sums[M][N];
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[j][n] = add ? V::load(out + j * out_stride + n * W) : V::zero();
  for (int64_t m = 0; m < count; ++m) {
    const X* from = x + rows[m] * x_stride;
    Reg right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = V::load(from + n * W);
#pragma GCC unroll 8
    for (int j = 0; j < M; ++j) {
      Reg left = V::set(u[m * u_stride + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[j][n] = V::fma(left, right[n], sums[j][n]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < M; ++j)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) V::store(out + j * out_stride + n * W, sums[j][n]);
}

template <int N, class X>
void outer_columns(const X* x, int64_t x_stride, const int32_t* rows, int64_t count, const float* u, int64_t u_stride,
                   int64_t ranks, float* out, int64_t out_stride, bool add) {
  int64_t j = 0;
  for (; j + 4 <= ranks; j += 4)
    outer_tile<4, N>(x, x_stride, rows, count, u + j, u_stride, out + j * out_stride, out_stride, add);
  for (; j + 2 <= ranks; j += 2)
    outer_tile<2, N>(x, x_stride, rows, count, u + j, u_stride, out + j * out_stride, out_stride, add);
  for (; j < ranks; ++j)
    outer_tile<1, N>(x, x_stride, rows, count, u + j, u_stride, out + j * out_stride, out_stride, add);
}

template <class X>
void outer(const void* data, int64_t x_stride, const int32_t* rows, int64_t count, const float* u, int64_t u_stride,
           int64_t ranks, int64_t columns, float* out, int64_t out_stride, bool add) {
  const X* x = static_cast<const X*>(data);
  int64_t o = 0;
  for (; o + V::OUTER * W <= columns; o += V::OUTER * W)
    outer_columns<V::OUTER>(x + o, x_stride, rows, count, u, u_stride, ranks, out + o, out_stride, add);
  for (; o + W <= columns; o += W)
    outer_columns<1>(x + o, x_stride, rows, count, u, u_stride, ranks, out + o, out_stride, add);
  if (o == columns) return;
  const int rest = static_cast<int>(columns - o);
  for (int64_t j = 0; j < ranks; ++j) {
    Reg sum = add ? V::load(out + j * out_stride + o, rest) : V::zero();
    for (int64_t m = 0; m < count; ++m)
      sum = V::fma(V::set(u[m * u_stride + j]), V::load(x + rows[m] * x_stride + o, rest), sum);
    V::store(out + j * out_stride + o, sum, rest);
  }
}

inline float wide(float value) { return value; }

inline float wide(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

template <class X>
void transpose(const void* data, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  const X* from = static_cast<const X*>(data);
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  // Whole cache lines on either side: 16 columns are a line of `from`, 16 rows one of `to`. The processor does not
  // foresee steps of a row, so the lines of the next 16 columns are asked for here.
  for (int64_t line = 0; line < whole_columns; line += 16)
    for (int64_t r = 0; r < whole_rows; r += 8) {
      if (line + 32 <= whole_columns) {
        for (int64_t i = 0; i < 8; ++i) __builtin_prefetch(from + (r + i) * from_stride + line + 16);
        if (r % 16 == 0)
          for (int64_t i = 16; i < 32; ++i) __builtin_prefetch(to + (line + i) * to_stride + r, 1);
      }
      for (int64_t c = line; c < whole_columns && c < line + 16; c += 8)
        V::transpose8(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
      to[c * to_stride + r] = wide(from[r * from_stride + c]);
}

void widen(const bf16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = wide(from[i]);
}

void narrow(const float* from, bf16* to, int64_t count) {
  int64_t i = 0;
  for (; i + W <= count; i += W) V::narrow(from + i, to + i);
  if (i == count) return;
  float rest[W] = {};
  bf16 out[W];
  std::memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(float));
  V::narrow(rest, out);
  std::memcpy(to + i, out, static_cast<size_t>(count - i) * sizeof(bf16));
}

}  // namespace
}  // namespace moelora

#include "expand.inl"

namespace moelora {
namespace {

constexpr Kernels TABLE = {{dot<float>, dot<bf16>},
                           {expand<float>, expand<bf16>},
                           {combine<float>, combine<bf16>},
                           {outer<float>, outer<bf16>},
                           {transpose<float>, transpose<bf16>},
                           widen,
                           narrow};

}  // namespace
}  // namespace moelora
