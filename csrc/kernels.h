// The three products that all work is made of, once per instruction set.
//
// A product reads or writes rows of a big matrix through a list of row numbers (the tokens that chose an expert), so
// nothing is ever gathered into a copy. Big matrices are float32 or bfloat16; everything else is float32.
#pragma once

#include <cstdint>

namespace moelora {

struct bf16 {
  uint16_t bits;
};

// Where there are two of a product, the first is for float32 and the second for bfloat16.
struct Kernels {
  // out[m, j] = sum over d of x[rows[m], d] * w[j, d]; added to out if `add`. Of x.
  void (*dot[2])(const void* x, int64_t x_stride, const int32_t* rows, int64_t count, const float* w, int64_t w_stride,
                 int64_t ranks, int64_t length, float* out, int64_t out_stride, bool add);

  // y[rows[m] - origin, o] += sum over j of u[m, j] * w[j, o]; where fresh[m] is 1, y is not read and the sum starts
  // from onto[rows[m], o]. Of onto.
  void (*expand[2])(const float* u, int64_t u_stride, const int32_t* rows, const uint8_t* fresh, int64_t count,
                    const float* w, int64_t w_stride, int64_t ranks, int64_t columns, const void* onto,
                    int64_t onto_stride, float* y, int64_t origin, int64_t y_stride);

  // y[o] = onto[o] + sum over i of u[i] * w[rows[i], o]. Of onto.
  void (*combine[2])(const float* u, const int64_t* rows, int64_t count, const float* w, int64_t w_stride,
                     int64_t columns, const void* onto, float* y);

  // out[j, o] = sum over m of u[m, j] * x[rows[m], o]; added to out if `add`. Of x.
  void (*outer[2])(const void* x, int64_t x_stride, const int32_t* rows, int64_t count, const float* u,
                   int64_t u_stride, int64_t ranks, int64_t columns, float* out, int64_t out_stride, bool add);

  // to[c, r] = from[r, c]. Of from.
  void (*transpose[2])(const void* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                       int64_t to_stride);

  void (*widen)(const bf16* from, float* to, int64_t count);
  void (*narrow)(const float* from, bf16* to, int64_t count);  // to the nearest, ties to even
};

// Null where the machine or the compiler lacks the instructions.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace moelora
