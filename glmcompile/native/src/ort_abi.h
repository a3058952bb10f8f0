// The part of ONNX Runtime's C ABI that this library uses, and a thin C++ layer over it.
//
// No Python package ships ONNX Runtime's C headers. The C API is an append-only table of function
// pointers, so the slots listed here stay valid in every later release.
//
// An operator is a class with
//     static constexpr const char* kName, *kDomain;
//     static constexpr Port kInputs[], kOutputs[];       // names serve error messages
//     explicit Op(const KernelInfo& info);               // reads attributes
//     void compute(KernelContext& context) const;        // may run concurrently with itself
// and, where outputs reuse input buffers,
//     static constexpr Alias kAliases[];
// Both members report errors by throwing; the text becomes the OrtStatus of session creation or
// of `run`. Throw Error for a caller's mistake (INVALID_ARGUMENT).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtApi;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};
}  // extern "C"

namespace glmcompile {

// A mistake of the caller: malformed input or attribute. The message names it.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// ONNX tensor element types (TensorProto numbering as ONNX Runtime's C API has it).
enum class Type : int {
  kAny = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10,
  kBfloat16 = 16,
};

inline const char* type_name(Type type) {
  switch (type) {
    case Type::kFloat: return "float32";
    case Type::kUint8: return "uint8";
    case Type::kInt8: return "int8";
    case Type::kInt32: return "int32";
    case Type::kInt64: return "int64";
    case Type::kFloat16: return "float16";
    case Type::kBfloat16: return "bfloat16";
    default: return "another type";
  }
}

template <class T> struct TypeOf;
template <> struct TypeOf<float> { static constexpr Type value = Type::kFloat; };
template <> struct TypeOf<uint8_t> { static constexpr Type value = Type::kUint8; };
template <> struct TypeOf<int8_t> { static constexpr Type value = Type::kInt8; };
template <> struct TypeOf<int32_t> { static constexpr Type value = Type::kInt32; };
template <> struct TypeOf<int64_t> { static constexpr Type value = Type::kInt64; };

struct Port {
  const char* name;
  Type type;
  bool optional = false;
};

// The ports of an operator that has more than another one, whose ports come first.
template <size_t A, size_t B>
constexpr std::array<Port, A + B> joined(const Port (&first)[A], const Port (&more)[B]) {
  std::array<Port, A + B> all{};
  for (size_t i = 0; i < A; ++i) all[i] = first[i];
  for (size_t i = 0; i < B; ++i) all[A + i] = more[i];
  return all;
}

struct Alias {
  int input;
  int output;
};

inline constexpr uint32_t kApiVersion = 18;

// The API table, set once by RegisterCustomOps.
class Api {
 public:
  static void set(const OrtApi* api) { table() = reinterpret_cast<void* const*>(api); }

  template <class Function>
  static Function* slot(size_t index) {
    return reinterpret_cast<Function*>(table()[index]);
  }

  static OrtStatus* make_status(int code, const char* message) {
    return slot<OrtStatus*(int, const char*)>(0)(code, message);
  }
  static void release_status(OrtStatus* status) { slot<void(OrtStatus*)>(93)(status); }

  static void throw_on_error(OrtStatus* status) {
    if (status == nullptr) return;
    std::string message = slot<const char*(const OrtStatus*)>(2)(status);
    release_status(status);
    throw std::runtime_error(message);
  }

 private:
  static void* const*& table() {
    static void* const* api = nullptr;
    return api;
  }
};

// A view of a tensor that ONNX Runtime owns. A default-constructed one means "absent".
class Tensor {
 public:
  static constexpr size_t kMaxRank = 8;

  Tensor() = default;
  Tensor(const OrtValue* value, const char* name) : name_(name) {
    if (value == nullptr) return;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Api::throw_on_error(
        Api::slot<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, &info));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> guard(
        info, Api::slot<void(OrtTensorTypeAndShapeInfo*)>(99));
    int type = 0;
    Api::throw_on_error(
        Api::slot<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int*)>(60)(info, &type));
    type_ = static_cast<Type>(type);
    Api::throw_on_error(
        Api::slot<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, &rank_));
    check(rank_ <= kMaxRank, name, ": rank ", rank_, " is above ", kMaxRank);
    Api::throw_on_error(Api::slot<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(
        62)(info, shape_, rank_));
    Api::throw_on_error(Api::slot<OrtStatus*(OrtValue*, void**)>(51)(
        const_cast<OrtValue*>(value), &data_));
    present_ = true;
  }

  explicit operator bool() const { return present_; }
  const char* name() const { return name_; }
  Type type() const { return type_; }
  size_t rank() const { return rank_; }
  int64_t dim(size_t axis) const { return shape_[axis]; }
  const int64_t* shape() const { return shape_; }
  int64_t size() const {
    int64_t count = 1;
    for (size_t i = 0; i < rank_; ++i) count *= shape_[i];
    return count;
  }
  std::string shape_text() const {
    std::string text = "[";
    for (size_t i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
    return text + "]";
  }
  void* raw() const { return data_; }

  template <class T>
  T* data() const {
    check(present_, name_, ": the tensor is required");
    check(type_ == TypeOf<T>::value, name_, ": expected ", type_name(TypeOf<T>::value), ", got ",
          type_name(type_));
    return static_cast<T*>(data_);
  }

 private:
  const char* name_ = "";
  bool present_ = false;
  Type type_ = Type::kAny;
  size_t rank_ = 0;
  int64_t shape_[kMaxRank] = {};
  void* data_ = nullptr;
};

// Attributes of the node, while the kernel is constructed.
class KernelInfo {
 public:
  explicit KernelInfo(const OrtKernelInfo* info) : info_(info) {}

  bool read(const char* name, int64_t* value) const { return scalar(86, name, value); }
  bool read(const char* name, float* value) const { return scalar(85, name, value); }
  bool read(const char* name, std::string* value) const {
    auto get = Api::slot<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)>(87);
    size_t size = 0;
    if (OrtStatus* status = get(info_, name, nullptr, &size)) {
      Api::release_status(status);
      return false;
    }
    std::string text(size, '\0');
    Api::throw_on_error(get(info_, name, text.data(), &size));
    text.resize(size == 0 ? 0 : size - 1);  // ONNX Runtime counts the terminating zero
    *value = text;
    return true;
  }

  template <class T>
  T attribute(const char* name, T fallback) const {
    read(name, &fallback);
    return fallback;
  }
  template <class T>
  T required(const char* name) const {
    T value{};
    check(read(name, &value), "attribute ", name, " is required");
    return value;
  }

  // Input `index` if it is an initializer, else an absent tensor.
  Tensor constant_input(size_t index, const char* name) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    Api::throw_on_error(
        Api::slot<OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>(249)(
            info_, index, &is_constant, &value));
    return is_constant ? Tensor(value, name) : Tensor();
  }

 private:
  template <class T>
  bool scalar(size_t slot, const char* name, T* value) const {
    OrtStatus* status =
        Api::slot<OrtStatus*(const OrtKernelInfo*, const char*, T*)>(slot)(info_, name, value);
    if (status == nullptr) return true;
    Api::release_status(status);
    return false;
  }

  const OrtKernelInfo* info_;
};

// Inputs, outputs and ONNX Runtime's thread pool during one call of a kernel.
class KernelContext {
 public:
  KernelContext(OrtKernelContext* context, const Port* inputs, const Port* outputs)
      : context_(context), inputs_(inputs), outputs_(outputs) {
    Api::throw_on_error(Api::slot<OrtStatus*(const OrtKernelContext*, size_t*)>(88)(
        context_, &input_count_));
    Api::throw_on_error(Api::slot<OrtStatus*(const OrtKernelContext*, size_t*)>(89)(
        context_, &output_count_));
  }

  // Absent (false) when the node leaves the optional input out.
  Tensor input(size_t index) const {
    if (index >= input_count_) return Tensor(nullptr, inputs_[index].name);
    const OrtValue* value = nullptr;
    Api::throw_on_error(Api::slot<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>(
        90)(context_, index, &value));
    return Tensor(value, inputs_[index].name);
  }

  // Allocates the output; absent (false) when the node does not ask for it.
  Tensor output(size_t index, const int64_t* shape, size_t rank) {
    if (index >= output_count_) return Tensor(nullptr, outputs_[index].name);
    OrtValue* value = nullptr;
    Api::throw_on_error(
        Api::slot<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>(91)(
            context_, index, shape, rank, &value));
    return Tensor(value, outputs_[index].name);
  }

  // Runs body(0) .. body(count - 1) on the session's intra-op threads. The first exception is
  // thrown again here, after all tasks have ended.
  template <class Body>
  void parallel_for(size_t count, const Body& body) const {
    if (count == 0) return;
    if (count == 1) {
      body(size_t{0});
      return;
    }
    struct Call {
      const Body* body;
      std::exception_ptr error;
      int failed;
    } call{&body, nullptr, 0};
    auto task = +[](void* data, size_t index) {
      Call* state = static_cast<Call*>(data);
      try {
        (*state->body)(index);
      } catch (...) {
        if (__atomic_exchange_n(&state->failed, 1, __ATOMIC_ACQ_REL) == 0)
          state->error = std::current_exception();
      }
    };
    Api::throw_on_error(
        Api::slot<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,
                             void*)>(274)(context_, task, count, count, &call));
    if (call.error) std::rethrow_exception(call.error);
  }

 private:
  OrtKernelContext* context_;
  const Port* inputs_;
  const Port* outputs_;
  size_t input_count_ = 0;
  size_t output_count_ = 0;
};

namespace detail {

template <class Function>
OrtStatus* guarded(const char* op, const Function& function) noexcept {
  constexpr int kFail = 1, kInvalidArgument = 2;
  try {
    function();
    return nullptr;
  } catch (const Error& error) {
    return Api::make_status(kInvalidArgument, (std::string(op) + ": " + error.what()).c_str());
  } catch (const std::exception& error) {
    return Api::make_status(kFail, (std::string(op) + ": " + error.what()).c_str());
  } catch (...) {
    return Api::make_status(kFail, (std::string(op) + ": unknown error").c_str());
  }
}

template <class Op, class = void>
struct Aliases {
  static size_t get(int**, int**) { return 0; }
  static void release(int*, int*) {}
};
template <class Op>
struct Aliases<Op, std::void_t<decltype(Op::kAliases)>> {
  static size_t get(int** inputs, int** outputs) {
    constexpr size_t count = std::size(Op::kAliases);
    *inputs = new int[count];
    *outputs = new int[count];
    for (size_t i = 0; i < count; ++i) {
      (*inputs)[i] = Op::kAliases[i].input;
      (*outputs)[i] = Op::kAliases[i].output;
    }
    return count;
  }
  static void release(int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  }
};

}  // namespace detail

// The OrtCustomOp of an operator class; lives as long as the library.
template <class Op>
const OrtCustomOp* custom_op() {
  static const OrtCustomOp table = [] {
    OrtCustomOp op{};
    op.version = 18;
    op.GetName = [](const OrtCustomOp*) { return Op::kName; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    op.GetInputType = [](const OrtCustomOp*, size_t i) {
      return static_cast<int>(Op::kInputs[i].type);
    };
    op.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kInputs); };
    op.GetOutputType = [](const OrtCustomOp*, size_t i) {
      return static_cast<int>(Op::kOutputs[i].type);
    };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Op::kOutputs); };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Op*>(kernel); };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Op::kInputs[i].optional ? 1 : 0;
    };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Op::kOutputs[i].optional ? 1 : 0;
    };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info,
                           void** kernel) {
      return detail::guarded(Op::kName, [&] { *kernel = new Op(KernelInfo(info)); });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* raw) {
      return detail::guarded(Op::kName, [&] {
        KernelContext context(raw, std::data(Op::kInputs), std::data(Op::kOutputs));
        static_cast<const Op*>(kernel)->compute(context);
      });
    };
    op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
    op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
    op.GetMayInplace = [](int**, int**) { return size_t{0}; };
    op.ReleaseMayInplace = [](int*, int*) {};
    op.GetAliasMap = [](int** inputs, int** outputs) {
      return detail::Aliases<Op>::get(inputs, outputs);
    };
    op.ReleaseAliasMap = [](int* inputs, int* outputs) {
      detail::Aliases<Op>::release(inputs, outputs);
    };
    return op;
  }();
  return &table;
}

}  // namespace glmcompile
