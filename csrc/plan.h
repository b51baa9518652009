// Which token goes through which unit, in the order in which it is worked off.
#pragma once

#include "parallel.h"

namespace moelora {

// Pairs (token, unit), sorted by unit and within a unit by token. The tokens are also cut into blocks: unit `u` has its
// pairs of block `b` at begin[u * blocks + b] up to begin[u * blocks + b + 1], so the pairs of a unit are contiguous.
// There is at least one token. Everything here follows from shapes and indices alone, never from the number of threads.
struct Plan {
  static constexpr int64_t BLOCK = 64;  // tokens of a block
  int64_t tokens, units, blocks;
  const int32_t* row;    // [pairs] the token
  const uint8_t* fresh;  // [pairs] 1 where it is the first pair of its token, 0 elsewhere
  const int64_t* begin;  // [units * blocks + 1]
  const int64_t* place;  // [tokens, k] where the pair of a token's choice is
  const int64_t* unit;   // [tokens, k] the choice itself; null where every token is in all units

  int64_t pairs() const { return begin[units * blocks]; }
  int64_t first(int64_t u) const { return begin[u * blocks]; }
  bool used(int64_t u) const { return first(u) < first(u + 1); }
};

// The chosen units, index [tokens, k]. Throws std::runtime_error where a unit is outside 0..units-1 or a token has
// it twice.
Plan chosen(const int64_t* index, int64_t tokens, int64_t k, int64_t units, Workspace& memory);

// Every token in every one of the units; with one unit, plain matrix products.
Plan everyone(int64_t tokens, int64_t units, Workspace& memory);

}  // namespace moelora
