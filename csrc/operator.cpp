// torch.ops.moelora.cpu_forward and cpu_backward for the dispatch key CPU. Their schemas are defined in
// moelora/ops/cpu.py, as is autograd. Only PyTorch's stable ABI is used: one binary serves every torch from 2.10 on,
// and every Python.
#include "routed_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace moelora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void parallel(int64_t tasks, int64_t cost, const std::function<void(int64_t, int64_t)>& work) {
  constexpr int64_t WORTH = 32 * 1024;  // numbers per thread below which another thread costs more than it saves
  torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, WORTH / std::max<int64_t>(1, cost)), work);
}

int64_t threads() { return torch::stable::get_num_threads(); }

namespace {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "moelora: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());  // a RuntimeError in Python
}

// Memory from torch's allocator, so that torch's own checks for unwritten memory see it too.
class TorchWorkspace final : public Workspace {
 public:
  explicit TorchWorkspace(const Tensor& like) : like_(like) {}

 private:
  void* bytes(int64_t count) override {
    const int64_t words = (count + 3) / 4;
    taken_.push_back(torch::stable::new_empty(like_, {words}, ScalarType::Float));
    return taken_.back().mutable_data_ptr();
  }

  Tensor like_;
  std::vector<Tensor> taken_;
};

// Tensors whose memory a problem points into.
class Inputs {
 public:
  // [rows, columns] as a matrix; copied only where its columns are not adjacent.
  Matrix matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    check(name, tensor, {rows, columns});
    const bool half = tensor.scalar_type() == ScalarType::BFloat16;
    require(half || tensor.scalar_type() == ScalarType::Float, name, " is neither float32 nor bfloat16");
    const Tensor& kept = keep(tensor.stride(1) == 1 || columns <= 1 ? tensor : torch::stable::contiguous(tensor));
    return {kept.const_data_ptr(), half, kept.stride(0)};
  }

  template <class T>
  const T* flat(const char* name, const Tensor& tensor, std::vector<int64_t> shape, ScalarType type) {
    check(name, tensor, shape);
    require(tensor.scalar_type() == type, name, " has the wrong dtype");
    return static_cast<const T*>(keep(torch::stable::contiguous(tensor)).const_data_ptr());
  }

 private:
  static void check(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
    require(tensor.is_cpu(), name, " is not on the CPU");
    require(tensor.dim() == static_cast<int64_t>(shape.size()), name, " has ", tensor.dim(), " dimensions, not ",
                  shape.size());
    for (size_t i = 0; i < shape.size(); ++i)
      require(tensor.size(static_cast<int64_t>(i)) == shape[i], "dimension ", i, " of ", name, " is ",
                    tensor.size(static_cast<int64_t>(i)), ", not ", shape[i]);
  }

  const Tensor& keep(const Tensor& tensor) {
    kept_.push_back(tensor);
    return kept_.back();
  }

  std::vector<Tensor> kept_;
};

Problem pose(Inputs& inputs, const Tensor& x, const std::optional<Tensor>& A, const Tensor& B, const Tensor& scale,
             const Tensor& weight, const std::optional<Tensor>& index, const std::optional<Tensor>& core,
             int64_t width, bool read_x = true) {
  require(x.dim() == 2 && B.dim() == 2 && weight.dim() == 2, "x, B and weight are matrices");
  require(!A || A->dim() == 2, "A is a matrix");
  require(!core || core->dim() == 3, "core has ", core ? core->dim() : 0, " dimensions, not 3");
  require(core || width > 0, "width is ", width, ", not positive");  // a core has no blocks
  Problem p{};
  p.tokens = x.size(0), p.inputs = x.size(1), p.outputs = B.size(0), p.columns = B.size(1);
  p.ranks = A ? A->size(0) : p.inputs;
  p.units = core ? core->size(0) : p.columns / width;
  p.width = core ? p.columns : width;
  p.mix = core ? Mix::core : p.columns == p.ranks ? Mix::blocks : Mix::shared;
  p.k = index ? weight.size(1) : p.units;
  require(core || p.units * width == p.columns, "B has ", p.columns, " columns, not a multiple of ", width);
  require(p.mix == Mix::shared ? p.width == p.ranks : p.columns == p.ranks, "B has ", p.columns,
                " columns, which does not go with h of ", p.ranks, " ranks and blocks of ", p.width);
  require(!core || (core->size(1) == p.ranks && core->size(2) == p.ranks), "core is not [units, ", p.ranks, ", ",
          p.ranks, "]");
  require(p.inputs > 0 && p.outputs > 0 && p.ranks > 0 && p.columns > 0 && p.units > 0 && p.k > 0,
          "a tensor has no elements");
  require(p.tokens < (int64_t{1} << 31), "x has ", p.tokens, " rows; at most 2^31 - 1 are possible");
  if (read_x) p.x = inputs.matrix("x", x, p.tokens, p.inputs);
  if (A) p.A = inputs.matrix("A", *A, p.ranks, p.inputs);
  p.B = inputs.matrix("B", B, p.outputs, p.columns);
  p.scale = inputs.flat<float>("scale", scale, {p.columns}, ScalarType::Float);
  p.weight = inputs.flat<float>("weight", weight, {p.tokens, p.k}, ScalarType::Float);
  if (index) p.index = inputs.flat<int64_t>("index", *index, {p.tokens, p.k}, ScalarType::Long);
  if (core) {
    const Tensor rows = torch::stable::reshape(*core, {p.units * p.ranks, p.ranks});
    p.core = inputs.matrix("core", rows, p.units * p.ranks, p.ranks);
  }
  return p;
}

Target rows_of(const Tensor& tensor, int64_t stride) {
  return {tensor.mutable_data_ptr(), tensor.scalar_type() == ScalarType::BFloat16, stride};
}

std::tuple<Tensor, Tensor> cpu_forward(Tensor x, std::optional<Tensor> A, Tensor B, Tensor scale, Tensor weight,
                                       std::optional<Tensor> index, std::optional<Tensor> core, int64_t width,
                                       std::optional<Tensor> onto) {
  Inputs inputs;
  const Problem p = pose(inputs, x, A, B, scale, weight, index, core, width);
  Matrix start{};
  if (onto) start = inputs.matrix("onto", *onto, p.tokens, p.outputs);
  TorchWorkspace memory(x);
  Tensor y = torch::stable::new_empty(onto ? *onto : x, {p.tokens, p.outputs});
  std::vector<int64_t> shape = A ? std::vector<int64_t>{p.tokens, p.h_columns()} : std::vector<int64_t>{0};
  Tensor h = torch::stable::new_empty(x, shape, ScalarType::Float);
  float* image = A ? static_cast<float*>(h.mutable_data_ptr()) : nullptr;
  if (p.tokens > 0) forward(p, start, rows_of(y, p.outputs), image, memory);
  return {y, h};
}

// need: bits 0 to 4 ask for the gradients of x, A, B, weight and core.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_backward(Tensor dy, Tensor x, std::optional<Tensor> A, Tensor B,
                                                                Tensor scale, Tensor weight,
                                                                std::optional<Tensor> index,
                                                                std::optional<Tensor> core, Tensor h, int64_t width,
                                                                int64_t need) {
  Inputs inputs;
  const bool read_x = !A || ((need >> 1) & 1) != 0;  // x that only its shape is known of is a scalar, expanded
  const Problem p = pose(inputs, x, A, B, scale, weight, index, core, width, read_x);
  const Matrix upstream = inputs.matrix("dy", dy, p.tokens, p.outputs);
  const float* image = A ? inputs.flat<float>("h", h, {p.tokens, p.h_columns()}, ScalarType::Float) : nullptr;
  TorchWorkspace memory(x);
  Gradients to{};
  Target gates{};
  // The gradient of a tensor, empty where it is not asked for; the kernels find it in `target`.
  const auto gradient = [&](const std::optional<Tensor>& of, int bit, int64_t stride, Target& target) {
    if (!of || ((need >> bit) & 1) == 0) return torch::stable::new_empty(x, {0});
    const auto sizes = of->sizes();
    Tensor made = torch::stable::new_empty(*of, std::vector<int64_t>(sizes.begin(), sizes.end()));
    target = rows_of(made, stride);
    return p.tokens == 0 ? torch::stable::zero_(made) : made;
  };
  Tensor dx = gradient(x, 0, p.inputs, to.x), dA = gradient(A, 1, p.inputs, to.A);
  Tensor dB = gradient(B, 2, p.columns, to.B), dweight = gradient(weight, 3, p.k, gates);
  Tensor dcore = gradient(core, 4, p.ranks, to.core);
  to.weight = static_cast<float*>(gates.data);
  if (p.tokens > 0) backward(p, upstream, image, to, memory);
  return {dx, dA, dB, dweight, dcore};
}

// Level of the kernels in use, 1 to 3; a wanted level is taken first where the machine has it.
int64_t cpu_level(int64_t wanted) { return use(wanted); }

}  // namespace

// An operator without tensors has no device.
STABLE_TORCH_LIBRARY_IMPL(moelora, CompositeExplicitAutograd, library) {
  library.impl("cpu_level", TORCH_BOX(&cpu_level));
}

STABLE_TORCH_LIBRARY_IMPL(moelora, CPU, library) {
  library.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  library.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

}  // namespace moelora
