// The operator of moelora/ops/reference.py, computing only the chosen units.
#pragma once

#include "products.h"

namespace moelora {

enum class Mix { blocks, shared, core };

struct Problem {
  Mix mix;
  int64_t tokens, inputs, outputs;  // T, D, O
  int64_t ranks, columns;           // R (of h), C (of B)
  int64_t units, width, k;          // G; columns of B per unit (a core has R); choices per token, 0 for dense gates
  Matrix x, A, B, core;             // [T, D]; [R, D] or null, then x is h; [O, C]; [G * R, R] or null
  const float* scale;               // [C]
  const float* weight;              // [T, k], or [T, G] for dense gates
  const int64_t* index;             // [T, k], or null for dense gates
};

// Gradients; null where they are not asked for.
struct Gradients {
  Target x, A, B, core;
  float* weight;
};

// Both return false, before anything is written, when an index is outside 0..units-1.
// y [T, O]; h [T, R] float32, null without A.
bool forward(const Problem& problem, const Target& y, float* h, Workspace& memory);
// dy [T, O]; h as forward gave it, null without A.
bool backward(const Problem& problem, const Matrix& dy, const float* h, const Gradients& to, Workspace& memory);

}  // namespace moelora
