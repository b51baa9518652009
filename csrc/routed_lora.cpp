#include "routed_lora.h"

#include <algorithm>
#include <cstring>

namespace moelora {
namespace {

// The plans of a problem. Without gates in between, all columns of a factor are one unit that every token chose.
struct Plans {
  Plan whole;  // one unit
  Plan pairs;  // the chosen units; of a core all units where gates are dense
  bool inside, outside;  // whether A's product, and whether B's, goes by `pairs`

  const Plan& lower() const { return inside ? pairs : whole; }
  const Plan& upper() const { return outside ? pairs : whole; }
};

bool plan(const Problem& p, Workspace& memory, Plans& out) {
  const bool sparse = p.index != nullptr;
  out.inside = sparse && p.mix == Mix::blocks;
  out.outside = sparse && p.mix != Mix::core;
  out.whole = everyone(p.tokens, 1, memory);
  if (sparse) return chosen(p.index, p.tokens, p.k, p.units, memory, out.pairs);
  if (p.mix == Mix::core) out.pairs = everyone(p.tokens, p.units, memory);
  return true;
}

// Runs work(token) for all tokens.
template <class F>
void each_token(int64_t tokens, int64_t cost, const F& work) {
  parallel(tokens, cost, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t);
  });
}

// Runs work(pair, token, unit) for all pairs.
template <class F>
void each_pair(const Plan& plan, int64_t width, const F& work) {
  parallel(plan.units, plan.pairs() * width / plan.units, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u)
      for (int64_t pair = plan.first(u); pair < plan.last(u); ++pair) work(pair, plan.row[pair], u);
  });
}

float gate(const Problem& p, int64_t token, int64_t slot) {
  return p.weight[token * (p.index != nullptr ? p.k : p.units) + slot];
}

// Blocks of the chosen units, [pairs, width], as whole rows [T, R] with zeros elsewhere.
void spread(const float* from, const Problem& p, const Plan& pairs, float* to) {
  each_token(p.tokens, p.ranks, [&](int64_t t) {
    std::memset(to + t * p.ranks, 0, static_cast<size_t>(p.ranks) * sizeof(float));
    for (int64_t s = 0; s < p.k; ++s)
      std::memcpy(to + t * p.ranks + p.index[t * p.k + s] * p.width, from + pairs.place[t * p.k + s] * p.width,
                  static_cast<size_t>(p.width) * sizeof(float));
  });
}

// Cores applied to h: [pairs, R].
float* through_cores(const Problem& p, const Plan& pairs, const float* h, const Factor& core, Workspace& memory) {
  auto* each = memory.take<float>(pairs.pairs() * p.ranks);
  down({h, false, p.ranks}, core, pairs, p.ranks, p.ranks, each);
  return each;
}

// u, scaled and gated, laid out for the product with B: [pairs, width] or [T, C]. each: of a core, else null.
float* mixed(const Problem& p, const Plans& plans, const float* h, const float* each, Workspace& memory) {
  auto* u = memory.take<float>(plans.upper().pairs() * (plans.outside ? p.width : p.columns));
  if (plans.outside) {
    each_pair(plans.pairs, p.width, [&](int64_t pair, int64_t t, int64_t unit) {
      const float g = gate(p, t, plans.pairs.slot[pair]);
      const float* from = h + t * p.ranks + (plans.inside ? unit * p.width : 0);
      for (int64_t j = 0; j < p.width; ++j) u[pair * p.width + j] = p.scale[unit * p.width + j] * g * from[j];
    });
    return u;
  }
  each_token(p.tokens, p.units * p.width, [&](int64_t t) {
    float* to = u + t * p.columns;
    if (p.mix != Mix::core) {
      for (int64_t unit = 0; unit < p.units; ++unit) {
        const float g = gate(p, t, unit);
        const float* from = h + t * p.ranks + (p.mix == Mix::blocks ? unit * p.width : 0);
        for (int64_t j = unit * p.width, i = 0; i < p.width; ++i, ++j) to[j] = p.scale[j] * g * from[i];
      }
      return;
    }
    const int64_t k = p.index != nullptr ? p.k : p.units;
    std::memset(to, 0, static_cast<size_t>(p.columns) * sizeof(float));
    for (int64_t s = 0; s < k; ++s) {
      const float g = gate(p, t, s);
      const float* from = each + plans.pairs.place[t * k + s] * p.ranks;
      for (int64_t i = 0; i < p.ranks; ++i) to[i] += g * from[i];
    }
    for (int64_t i = 0; i < p.ranks; ++i) to[i] *= p.scale[i];
  });
  return u;
}

// h [T, R] in float32 where x is h already.
const float* as_float(const Problem& p, Workspace& memory) {
  if (!p.x.half && p.x.stride == p.ranks) return static_cast<const float*>(p.x.data);
  auto* h = memory.take<float>(p.tokens * p.ranks);
  widen_rows(p.x, p.tokens, p.ranks, h);
  return h;
}

// Turns du, the gradient of u before scaling, into gate gradients (if asked) and dh: [pairs, width] in du's own place
// where A's product goes by pairs, else [T, R].
float* unmixed(const Problem& p, const Plans& plans, const float* h, float* du, float* dweight, Workspace& memory) {
  if (plans.inside) {
    each_pair(plans.pairs, p.width, [&](int64_t pair, int64_t t, int64_t unit) {
      const int64_t slot = plans.pairs.slot[pair];
      const float g = gate(p, t, slot);
      float* own = du + pair * p.width;
      float inner = 0;
      for (int64_t j = 0; j < p.width; ++j) {
        const float scaled = own[j] * p.scale[unit * p.width + j];
        inner += scaled * h[t * p.ranks + unit * p.width + j];
        own[j] = g * scaled;
      }
      if (dweight != nullptr) dweight[t * p.k + slot] = inner;
    });
    return du;
  }
  auto* dh = memory.take<float>(p.tokens * p.ranks);
  const int64_t k = p.index != nullptr ? p.k : p.units;
  each_token(p.tokens, p.units * p.width, [&](int64_t t) {
    std::memset(dh + t * p.ranks, 0, static_cast<size_t>(p.ranks) * sizeof(float));
    for (int64_t s = 0; s < k; ++s) {
      const int64_t unit = p.index != nullptr ? p.index[t * k + s] : s;
      const int64_t offset = p.mix == Mix::blocks ? unit * p.width : 0;
      const float* own = plans.outside ? du + plans.pairs.place[t * k + s] * p.width : du + t * p.columns + unit * p.width;
      const float g = gate(p, t, s);
      float inner = 0;
      for (int64_t j = 0; j < p.width; ++j) {
        const float scaled = own[j] * p.scale[unit * p.width + j];
        inner += scaled * h[t * p.ranks + offset + j];
        dh[t * p.ranks + offset + j] += g * scaled;
      }
      if (dweight != nullptr) dweight[t * k + s] = inner;
    }
  });
  return dh;
}

// The same for cores, and their own gradient. each: cores applied to h.
float* uncored(const Problem& p, const Plan& pairs, const float* h, const float* each, const Factor& core, float* du,
               const Gradients& to, Workspace& memory) {
  const int64_t k = p.index != nullptr ? p.k : p.units;
  auto* gated = memory.take<float>(pairs.pairs() * p.ranks);
  each_token(p.tokens, p.units * p.width, [&](int64_t t) {
    float* own = du + t * p.ranks;
    for (int64_t i = 0; i < p.ranks; ++i) own[i] *= p.scale[i];
    for (int64_t s = 0; s < k; ++s) {
      const int64_t pair = pairs.place[t * k + s];
      const float g = gate(p, t, s);
      float inner = 0;
      for (int64_t i = 0; i < p.ranks; ++i) {
        if (to.weight != nullptr) inner += own[i] * each[pair * p.ranks + i];
        gated[pair * p.ranks + i] = g * own[i];
      }
      if (to.weight != nullptr) to.weight[t * k + s] = inner;
    }
  });
  if (to.core.data != nullptr) gather(gated, {h, false, p.ranks}, pairs, p.ranks, p.ranks, to.core, false);
  auto* dh = memory.take<float>(p.tokens * p.ranks);
  up(gated, core, pairs, p.ranks, p.ranks, {dh, false, p.ranks});
  return dh;
}

}  // namespace

bool forward(const Problem& p, const Target& y, float* h, Workspace& memory) {
  Plans plans;
  if (!plan(p, memory, plans)) return false;
  const float* image = h;
  if (h == nullptr) {
    image = as_float(p, memory);
  } else {
    const Factor A = factor(p.A, plans.lower(), plans.inside ? p.width : p.ranks, p.inputs, memory);
    if (plans.inside) {
      auto* blocks = memory.take<float>(plans.pairs.pairs() * p.width);
      down(p.x, A, plans.pairs, p.width, p.inputs, blocks);
      spread(blocks, p, plans.pairs, h);
    } else {
      down(p.x, A, plans.whole, p.ranks, p.inputs, h);
    }
  }
  const float* each = nullptr;
  if (p.mix == Mix::core)
    each = through_cores(p, plans.pairs, image, factor(p.core, plans.pairs, p.ranks, p.ranks, memory), memory);
  const float* u = mixed(p, plans, image, each, memory);
  const int64_t width = plans.outside ? p.width : p.columns;
  up(u, transposed(p.B, plans.upper(), width, p.outputs, memory), plans.upper(), width, p.outputs, y);
  return true;
}

bool backward(const Problem& p, const Matrix& dy, const float* h, const Gradients& to, Workspace& memory) {
  Plans plans;
  if (!plan(p, memory, plans)) return false;
  if (h == nullptr) h = as_float(p, memory);
  const int64_t width = plans.outside ? p.width : p.columns;
  Factor core{};
  const float* each = nullptr;
  if (p.mix == Mix::core) {
    core = factor(p.core, plans.pairs, p.ranks, p.ranks, memory);
    if (to.B.data != nullptr || to.weight != nullptr) each = through_cores(p, plans.pairs, h, core, memory);
  }
  if (to.B.data != nullptr)
    gather(mixed(p, plans, h, each, memory), dy, plans.upper(), width, p.outputs, to.B, true);
  if (to.x.data == nullptr && to.A.data == nullptr && to.weight == nullptr && to.core.data == nullptr) return true;

  auto* du = memory.take<float>(plans.upper().pairs() * width);
  down(dy, transposed(p.B, plans.upper(), width, p.outputs, memory), plans.upper(), width, p.outputs, du);
  float* dh = p.mix == Mix::core ? uncored(p, plans.pairs, h, each, core, du, to, memory)
                                 : unmixed(p, plans, h, du, to.weight, memory);
  const int64_t inner = plans.inside ? p.width : p.ranks;
  if (p.A.data == nullptr) {
    if (to.x.data == nullptr) return true;
    if (plans.inside) {
      auto* rows = memory.take<float>(p.tokens * p.ranks);
      spread(dh, p, plans.pairs, rows);
      dh = rows;
    }
    narrow_rows(dh, p.tokens, p.ranks, to.x);
    return true;
  }
  if (to.A.data != nullptr) gather(dh, p.x, plans.lower(), inner, p.inputs, to.A, false);
  if (to.x.data != nullptr)
    up(dh, factor(p.A, plans.lower(), inner, p.inputs, memory), plans.lower(), inner, p.inputs, to.x);
  return true;
}

}  // namespace moelora
