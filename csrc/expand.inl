// The part of kernels.inl that adds to rows of y.

namespace moelora {
namespace {

// expand: M rows of y by N vectors of columns. y is read and written once for all ranks of an expert.
template <int M, int N>
void expand_tile(const float* u, int64_t u_stride, const float* const* from, const float* w, int64_t w_stride,
                 int64_t ranks, float* const* y) {
  Reg sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = V::load(from[m] + n * W);
  for (int64_t j = 0; j < ranks; ++j) {
    Reg right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = V::load(w + j * w_stride + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Reg left = V::set(u[m * u_stride + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = V::fma(left, right[n], sums[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) V::store(y[m] + n * W, sums[m][n]);
}

// N vectors of a row in float32: where they are, or widened in `kept`.
template <int N>
const float* in_float(const float* from, float*) {
  return from;
}

template <int N>
const float* in_float(const bf16* from, float* kept) {
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) V::store(kept + n * W, V::load(from + n * W));
  return kept;
}

template <int N, class X>
void expand_columns(const float* u, int64_t u_stride, const int32_t* rows, const uint8_t* fresh, int64_t count,
                    const float* w, int64_t w_stride, int64_t ranks, const X* onto, int64_t onto_stride, float* y,
                    int64_t origin, int64_t y_stride) {
  constexpr int M = 6;
  for (int64_t m = 0; m < count; m += M) {
    const int64_t now = count - m < M ? count - m : M;
    float kept[M][N * W];
    const float* from[M];
    float* at[M];
    for (int64_t i = 0; i < now; ++i) {
      at[i] = y + (rows[m + i] - origin) * y_stride;
      from[i] = fresh[m + i] ? in_float<N>(onto + rows[m + i] * onto_stride, kept[i]) : at[i];
    }
    with_count<M>(now, [&](auto all) {
      expand_tile<decltype(all)::value, N>(u + m * u_stride, u_stride, from, w, w_stride, ranks, at);
    });
  }
}

template <class X>
void expand(const float* u, int64_t u_stride, const int32_t* rows, const uint8_t* fresh, int64_t count, const float* w,
            int64_t w_stride, int64_t ranks, int64_t columns, const void* data, int64_t onto_stride, float* y,
            int64_t origin, int64_t y_stride) {
  const X* onto = static_cast<const X*>(data);
  int64_t o = 0;
  for (; o + V::EXPAND * W <= columns; o += V::EXPAND * W)
    expand_columns<V::EXPAND>(u, u_stride, rows, fresh, count, w + o, w_stride, ranks, onto + o, onto_stride, y + o,
                              origin, y_stride);
  for (; o + W <= columns; o += W)
    expand_columns<1>(u, u_stride, rows, fresh, count, w + o, w_stride, ranks, onto + o, onto_stride, y + o, origin,
                      y_stride);
  if (o == columns) return;
  const int rest = static_cast<int>(columns - o);
  for (int64_t m = 0; m < count; ++m) {
    float* to = y + (rows[m] - origin) * y_stride + o;
    Reg sum = fresh[m] ? V::load(onto + rows[m] * onto_stride + o, rest) : V::load(to, rest);
    for (int64_t j = 0; j < ranks; ++j)
      sum = V::fma(V::set(u[m * u_stride + j]), V::load(w + j * w_stride + o, rest), sum);
    V::store(to, sum, rest);
  }
}

// combine: one row of y from rows of w. For units so narrow that `expand` would mostly read and write y.
template <int N, class X>
void combine_tile(const float* u, const int64_t* rows, int64_t count, const float* w, int64_t w_stride, const X* onto,
                  float* y) {
  Reg sums[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sums[n] = V::load(onto + n * W);
  for (int64_t i = 0; i < count; ++i) {
    const float* from = w + rows[i] * w_stride;
    Reg left = V::set(u[i]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[n] = V::fma(left, V::load(from + n * W), sums[n]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) V::store(y + n * W, sums[n]);
}

template <class X>
void combine(const float* u, const int64_t* rows, int64_t count, const float* w, int64_t w_stride, int64_t columns,
             const void* data, float* y) {
  const X* onto = static_cast<const X*>(data);
  int64_t o = 0;
  for (; o + 8 * W <= columns; o += 8 * W) combine_tile<8>(u, rows, count, w + o, w_stride, onto + o, y + o);
  for (; o + W <= columns; o += W) combine_tile<1>(u, rows, count, w + o, w_stride, onto + o, y + o);
  if (o == columns) return;
  const int rest = static_cast<int>(columns - o);
  Reg sum = V::load(onto + o, rest);
  for (int64_t i = 0; i < count; ++i) sum = V::fma(V::set(u[i]), V::load(w + rows[i] * w_stride + o, rest), sum);
  V::store(y + o, sum, rest);
}

}  // namespace
}  // namespace moelora
