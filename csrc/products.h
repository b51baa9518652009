// The kernels spread over a plan: whole matrix products between tokens and the factors of the units they chose.
#pragma once

#include "kernels.h"
#include "plan.h"

namespace moelora {

// A matrix whose columns are adjacent; float32 or, if `half`, bfloat16.
struct Matrix {
  const void* data;
  bool half;
  int64_t stride;
};

struct Target {
  void* data;
  bool half;
  int64_t stride;
};

// Factors [units * width, features] in float32: unit u owns rows u * width and on.
struct Factor {
  const float* data;
  int64_t stride;
};

// The kernels in use: the fastest that this machine runs, unless `use` took others.
const Kernels& kernels();

// Takes the kernels of a level (1 portable, 2 AVX2, 3 AVX-512) if the machine runs them. Returns the level in use.
int64_t use(int64_t level);

// Matrix [units * width, features] as a factor; rows of units that nobody chose may be left unwritten.
Factor factor(const Matrix& from, const Plan& plan, int64_t width, int64_t features, Workspace& memory);

// Matrix [features, units * width], the other way round, as a factor.
Factor transposed(const Matrix& from, const Plan& plan, int64_t width, int64_t features, Workspace& memory);

// out[pair, j] = x[token] . w[unit, j]; x has `length` columns.
void down(const Matrix& x, const Factor& w, const Plan& plan, int64_t width, int64_t length, float* out);

// y[token] = onto[token] + sum over the token's pairs and j of u[pair, j] w[unit, j], rounded once; every element of y
// [tokens, columns] is written. onto: null is zero.
void up(const float* u, const Factor& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
        const Target& y);

// The same by the matrix [columns, units * width].
void up_across(const float* u, const Matrix& w, const Plan& plan, int64_t width, int64_t columns, const Matrix& onto,
               const Target& y, Workspace& memory);

// out[unit, j] = sum over the unit's pairs of u[pair, j] x[token], as [units * width, columns], or as its transpose
// if `across`; every element is written, units that nobody chose with zero.
void gather(const float* u, const Matrix& x, const Plan& plan, int64_t width, int64_t columns, const Target& out,
            bool across);

// Between rows of float32 and rows of either type.
void widen_rows(const Matrix& from, int64_t rows, int64_t columns, float* to);
void narrow_rows(const float* from, int64_t rows, int64_t columns, const Target& to);

}  // namespace moelora
