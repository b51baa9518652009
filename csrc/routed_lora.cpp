#include "routed_lora.h"

#include <algorithm>
#include <cstring>

namespace moelora {
namespace {

// The plans of a problem. Without gates in between, all columns of a factor are one unit that every token chose.
struct Plans {
  Plans(const Problem& p, Workspace& memory) : p(p), outside(p.index != nullptr && p.mix != Mix::core) {
    whole = everyone(p.tokens, 1, memory);
    if (p.index != nullptr)
      pairs = chosen(p.index, p.tokens, p.k, p.units, memory);
    else if (p.mix == Mix::core)
      pairs = everyone(p.tokens, p.units, memory);
  }

  const Plan& lower() const { return p.chosen_h() ? pairs : whole; }
  const Plan& upper() const { return outside ? pairs : whole; }
  int64_t upper_width() const { return outside ? p.width : p.columns; }

  int64_t unit(int64_t token, int64_t place) const { return p.index != nullptr ? p.index[token * p.k + place] : place; }
  int64_t pair(int64_t token, int64_t place) const { return pairs.place[token * p.k + place]; }
  float gate(int64_t token, int64_t place) const { return p.weight[token * p.k + place]; }

  // Where the unit at a place of a token begins: in u, the columns that meet B; and in h.
  int64_t in_u(int64_t token, int64_t place) const {
    return outside ? pair(token, place) * p.width : token * p.columns + unit(token, place) * p.width;
  }
  int64_t in_h(int64_t token, int64_t place) const {
    const int64_t block = p.mix != Mix::blocks ? 0 : p.chosen_h() ? place : unit(token, place);
    return token * p.h_columns() + block * p.width;
  }

  const Problem& p;
  Plan whole{};  // one unit
  Plan pairs{};  // the chosen units; of a core all units where gates are dense
  bool outside;  // whether B's product goes by `pairs`
};

// Runs work(token) for all tokens.
template <class F>
void each_token(const Problem& p, const F& work) {
  parallel(p.tokens, p.k * p.width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t);
  });
}

// h [T, R] in float32 where x is h already.
const float* as_float(const Problem& p, Workspace& memory) {
  if (!p.x.half && p.x.stride == p.ranks) return static_cast<const float*>(p.x.data);
  auto* h = memory.take<float>(p.tokens * p.ranks);
  widen_rows(p.x, p.tokens, p.ranks, h);
  return h;
}

// Cores applied to h: [pairs, R].
float* through_cores(const Plans& plans, const float* h, const Factor& core, Workspace& memory) {
  const int64_t ranks = plans.p.ranks;
  auto* each = memory.take<float>(plans.pairs.pairs() * ranks);
  down({h, false, ranks}, core, plans.pairs, ranks, ranks, each);
  return each;
}

// u, scaled and gated, laid out for the product with B: [pairs, width] or [T, C]. each: of a core, else null.
float* mixed(const Plans& plans, const float* h, const float* each, Workspace& memory) {
  const Problem& p = plans.p;
  auto* u = memory.take<float>(plans.upper().pairs() * plans.upper_width());
  each_token(p, [&](int64_t t) {
    if (p.mix == Mix::core) std::fill_n(u + t * p.ranks, p.ranks, 0.0f);
    for (int64_t s = 0; s < p.k; ++s) {
      const float g = plans.gate(t, s);
      if (p.mix == Mix::core) {
        const float* from = each + plans.pair(t, s) * p.ranks;
        for (int64_t i = 0; i < p.ranks; ++i) u[t * p.ranks + i] += g * from[i];
      } else {
        const float *from = h + plans.in_h(t, s), *scale = p.scale + plans.unit(t, s) * p.width;
        float* to = u + plans.in_u(t, s);
        for (int64_t j = 0; j < p.width; ++j) to[j] = scale[j] * g * from[j];
      }
    }
    for (int64_t i = 0; p.mix == Mix::core && i < p.ranks; ++i) u[t * p.ranks + i] *= p.scale[i];
  });
  return u;
}

// Turns du, the gradient of u before scaling, into gate gradients (if asked) and dh: [pairs, width] in du's own place
// where A's product goes by pairs, else [T, R].
float* unmixed(const Plans& plans, const float* h, float* du, float* dweight, Workspace& memory) {
  const Problem& p = plans.p;
  float* dh = p.chosen_h() ? nullptr : memory.take<float>(p.tokens * p.ranks);
  each_token(p, [&](int64_t t) {
    if (dh != nullptr) std::fill_n(dh + t * p.ranks, p.ranks, 0.0f);
    for (int64_t s = 0; s < p.k; ++s) {
      const float g = plans.gate(t, s);
      const float *from = h + plans.in_h(t, s), *scale = p.scale + plans.unit(t, s) * p.width;
      float* own = du + plans.in_u(t, s);
      float inner = 0;
      for (int64_t j = 0; j < p.width; ++j) {
        const float scaled = own[j] * scale[j];
        inner += scaled * from[j];
        own[j] = g * scaled;
      }
      if (dweight != nullptr) dweight[t * p.k + s] = inner;
      for (int64_t j = 0; dh != nullptr && j < p.width; ++j) dh[plans.in_h(t, s) + j] += own[j];
    }
  });
  return dh != nullptr ? dh : du;
}

// The same for cores, and their own gradient. each: cores applied to h.
float* uncored(const Plans& plans, const float* h, const float* each, const Factor& core, float* du,
               const Gradients& to, Workspace& memory) {
  const Problem& p = plans.p;
  auto* gated = memory.take<float>(plans.pairs.pairs() * p.ranks);
  each_token(p, [&](int64_t t) {
    float* own = du + t * p.ranks;
    for (int64_t i = 0; i < p.ranks; ++i) own[i] *= p.scale[i];
    for (int64_t s = 0; s < p.k; ++s) {
      const int64_t begin = plans.pair(t, s) * p.ranks;
      const float g = plans.gate(t, s);
      for (int64_t i = 0; i < p.ranks; ++i) gated[begin + i] = g * own[i];
      if (to.weight == nullptr) continue;
      float inner = 0;
      for (int64_t i = 0; i < p.ranks; ++i) inner += own[i] * each[begin + i];
      to.weight[t * p.k + s] = inner;
    }
  });
  if (to.core.data != nullptr) gather(gated, {h, false, p.ranks}, plans.pairs, p.ranks, p.ranks, to.core, false);
  auto* dh = memory.take<float>(p.tokens * p.ranks);
  up(gated, core, plans.pairs, p.ranks, p.ranks, {}, {dh, false, p.ranks});
  return dh;
}

}  // namespace

void forward(const Problem& p, const Matrix& onto, const Target& y, float* h, Workspace& memory) {
  const Plans plans(p, memory);
  const float* image = h;
  if (h == nullptr) {
    image = as_float(p, memory);
  } else {
    const int64_t width = p.chosen_h() ? p.width : p.ranks;
    float* sorted = p.chosen_h() ? memory.take<float>(plans.pairs.pairs() * width) : h;
    down(p.x, factor(p.A, plans.lower(), width, p.inputs, memory), plans.lower(), width, p.inputs, sorted);
    if (sorted != h)
      each_token(p, [&](int64_t t) {
        for (int64_t s = 0; s < p.k; ++s) std::copy_n(sorted + plans.pair(t, s) * width, width, h + plans.in_h(t, s));
      });
  }
  const float* each = nullptr;
  if (p.mix == Mix::core)
    each = through_cores(plans, image, factor(p.core, plans.pairs, p.ranks, p.ranks, memory), memory);
  const float* u = mixed(plans, image, each, memory);
  const int64_t width = plans.upper_width();
  up_across(u, p.B, plans.upper(), width, p.outputs, onto, y, memory);
}

void backward(const Problem& p, const Matrix& dy, const float* h, const Gradients& to, Workspace& memory) {
  const Plans plans(p, memory);
  if (h == nullptr) h = as_float(p, memory);
  const int64_t width = plans.upper_width();
  Factor core{};
  const float* each = nullptr;
  if (p.mix == Mix::core) {
    core = factor(p.core, plans.pairs, p.ranks, p.ranks, memory);
    if (to.B.data != nullptr || to.weight != nullptr) each = through_cores(plans, h, core, memory);
  }
  if (to.B.data != nullptr) gather(mixed(plans, h, each, memory), dy, plans.upper(), width, p.outputs, to.B, true);
  if (to.x.data == nullptr && to.A.data == nullptr && to.weight == nullptr && to.core.data == nullptr) return;

  auto* du = memory.take<float>(plans.upper().pairs() * width);
  down(dy, transposed(p.B, plans.upper(), width, p.outputs, memory), plans.upper(), width, p.outputs, du);
  const float* dh = p.mix == Mix::core ? uncored(plans, h, each, core, du, to, memory)
                                       : unmixed(plans, h, du, to.weight, memory);
  if (p.A.data == nullptr) {
    if (to.x.data != nullptr) narrow_rows(dh, p.tokens, p.ranks, to.x);
    return;
  }
  const int64_t inner = p.chosen_h() ? p.width : p.ranks;
  if (to.A.data != nullptr) gather(dh, p.x, plans.lower(), inner, p.inputs, to.A, false);
  if (to.x.data != nullptr)
    up(dh, factor(p.A, plans.lower(), inner, p.inputs, memory), plans.lower(), inner, p.inputs, {}, to.x);
}

}  // namespace moelora
