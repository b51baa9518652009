// The operator of moelora/ops/reference.py, computing only the chosen units.
#pragma once

#include "products.h"

namespace moelora {

enum class Mix { blocks, shared, core };

struct Problem {
  Mix mix;
  int64_t tokens, inputs, outputs;  // T, D, O; none is 0
  int64_t ranks, columns;           // R (of h), C (of B)
  int64_t units, width, k;          // G; columns of B per unit (a core has R); choices per token, G for dense gates
  Matrix x, A, B, core;             // [T, D]; [R, D] or null, then x is h; [O, C]; [G * R, R] or null
  const float* scale;               // [C]
  const float* weight;              // [T, k]
  const int64_t* index;             // [T, k], or null for dense gates: place s of a token is unit s

  // Whether A's product is of the chosen units alone.
  bool chosen_h() const { return index != nullptr && A.data != nullptr && mix == Mix::blocks; }
  // Columns of h: [T, k * width], a token's places side by side, or [T, R].
  int64_t h_columns() const { return chosen_h() ? k * width : ranks; }
};

// Gradients; null where they are not asked for.
struct Gradients {
  Target x, A, B, core;
  float* weight;
};

// Both throw std::runtime_error, before anything is written, when a row of the index names a unit twice or one
// outside 0..units-1.
// y [T, O] starts from onto [T, O], or from zero if that is null; h [T, h_columns] float32, null without A.
void forward(const Problem& problem, const Matrix& onto, const Target& y, float* h, Workspace& memory);
// dy [T, O]; h as forward gave it, null without A.
void backward(const Problem& problem, const Matrix& dy, const float* h, const Gradients& to, Workspace& memory);

}  // namespace moelora
